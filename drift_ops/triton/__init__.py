"""The ``triton`` backend: float32 kernels on CUDA tensors; form C also reads bfloat16 and float16.

Problems that one program can hold go to group kernels, all others are streamed. Called by :mod:`drift_ops.ops` only.
"""

from .affinity import affinity_sums as affinity_sums
from .affinity import affinity_sums_backward as affinity_sums_backward
from .loss import kept_shape as kept_shape
from .loss import loss_gradient as loss_gradient
from .loss import loss_moments as loss_moments
from .loss import loss_scale as loss_scale
from .loss import state_shape as state_shape
from .pairs import log_sums as log_sums
from .pairs import pair_gradients as pair_gradients
from .pairs import weighted_sums as weighted_sums
