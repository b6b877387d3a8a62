"""Networks to share: saved with a card of their run, to a folder or the Hugging Face hub, and loaded from there."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..errors import explained, require, shown
from .network_files import DESCRIPTION, KINDS, OWN, WEIGHTS, read_model, write_model

try:
    from huggingface_hub import PyTorchModelHubMixin as HubMixin
except Exception:  # It is an extra, and may be broken.

    class HubMixin:  # type: ignore[no-redef]
        """Stands in for the mixin of huggingface_hub, and says what is missing."""

        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *arguments: Any, **options: Any) -> None:
            require("huggingface_hub", "sharing a network", "hub")

        push_to_hub = save_pretrained


CARD = Path(__file__).parents[1] / "templates" / "model_card.md"
CONFIG, PICTURE = "config.yaml", "samples.png"
SHARED = [WEIGHTS, DESCRIPTION, CONFIG, PICTURE]  # A repository of the hub is downloaded as far as these.

P = TypeVar("P", bound="Pretrained")


class Pretrained(nn.Module, HubMixin, library_name="drifting", tags=["drifting", "one-step-generation"]):
    """A network of ours, which is a ``PyTorchModelHubMixin`` where huggingface_hub is installed.

    ``save_pretrained(folder)`` and ``push_to_hub("user/name")`` write what a run directory holds of a network, so that
    commands take the folder, or ``hf://user/name``, as they take a run. Of a network that was read from a run, its
    facts, its configuration and a picture of samples come along, and a model card tells of all that;
    ``model_card_kwargs={"license": "mit"}`` names the licence of the weights.
    """

    facts: Mapping[str, Any] = {}  # This is what the file beside its weights says.
    folder: Path | None = None  # It was read from there.
    config: dict[str, Any]  # The class builds the same network of these arguments.

    def __init_subclass__(cls, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind:  # A class derived from one of ours may compute anything: it has no kind.
            KINDS[kind] = cls

    @classmethod
    def from_pretrained(cls: type[P], source: str | Path, **options: Any) -> P:  # type: ignore[override]
        """Load the network of a run directory, of a saved folder or of ``"user/name"`` on the hub, in evaluation mode.

        Of ``options``, huggingface_hub's ``snapshot_download`` takes ``revision``, ``token``, ``cache_dir`` and others.
        It raises ValueError for what holds no network of this class.
        """
        folder = Path(source) if Path(source).is_dir() else download(str(source), **options)
        kinds = [kind for kind, its in KINDS.items() if its is cls]
        network, _ = read_model(folder, None if kinds else cls, kinds or [OWN])
        assert isinstance(network, cls)
        return network

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the network to ``repo_id``, ``"user/name"``, and return the address: see huggingface_hub's mixin. It
        raises ValueError with the hub's reason where that does not work."""
        of_card = {"model_id": repo_id} | (options.pop("model_card_kwargs", None) or {})
        with explained(f"cannot upload to {repo_id}"):
            return super().push_to_hub(repo_id, model_card_kwargs=of_card, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(save_directory, self, {"model": self.config, **self.facts})
        for name, file in self._of_run().items():
            if file != save_directory / name:
                shutil.copyfile(file, save_directory / name)

    def generate_model_card(
        self, *arguments: Any, license: str | None = None, model_id: str = "USER/NAME", **fields: Any
    ) -> Any:
        """Make the card of huggingface_hub's class ModelCard, whose metadata has ``license`` and further ``fields``."""
        hub, run = require("huggingface_hub", "a model card", "hub"), self._of_run()
        data = self._hub_mixin_info.model_card_data.to_dict() | {"license": license} | fields
        return hub.ModelCard.from_template(
            hub.ModelCardData(**data), template_str=CARD.read_text(encoding="utf-8"), model_id=model_id,
            license=license, network=self, name=type(self).__name__, facts=self.facts,
            count=f"{sum(p.numel() for p in self.parameters()):,}", picture=PICTURE if PICTURE in run else None,
            config=run[CONFIG].read_text(encoding="utf-8") if CONFIG in run else None,
        )  # fmt: skip

    def _of_run(self) -> dict[str, Path]:
        """The configuration and the latest picture of samples in the folder that the network was read from, by name."""
        if self.folder is None:
            return {}
        pictures = [self.folder / PICTURE, *sorted((self.folder / "samples").glob("step_*.png"))]
        found = {CONFIG: self.folder / CONFIG, PICTURE: pictures[-1]}
        return {name: file for name, file in found.items() if file.is_file()}


def download(repository: str, **options: Any) -> Path:
    """The folder that the network of ``repository``, ``"user/name"`` on the hub, is downloaded to.

    Without a connection it is what was downloaded before. It raises UserError where there is neither.
    """
    hub = require("huggingface_hub", f"the model {shown(repository)}", "hub")
    with explained(f"there is no folder {shown(repository)}, and the hub gives no model of that name"):
        return Path(hub.snapshot_download(repository, allow_patterns=SHARED, **options))
