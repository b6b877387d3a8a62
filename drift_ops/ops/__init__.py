"""What the public functions call: each step of the operator, whatever the backend and whoever traces."""

from .affinity import affinity_sums as affinity_sums
from .loss import Statistics as Statistics
from .loss import has_loss_at_once as has_loss_at_once
from .loss import log_mass as log_mass
from .loss import loss as loss
from .loss import loss_at_once as loss_at_once
from .pairs import DifferentiableSums as DifferentiableSums
from .registration import rows as rows
