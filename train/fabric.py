"""Lightning's Fabric without its Trainer.

``import lightning.fabric`` runs the package's ``__init__``, which imports the Trainer, and asks for torchmetrics'
version by importing it; together they bring scipy and half of transformers, none of which Fabric needs, and take as
long as torch itself, in every process of a job. So Fabric is imported here, as if it stood alone. Everything else of
the project takes it from here.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


@contextmanager
def _fabric_alone() -> Iterator[None]:
    """A block whose imports find the package ``lightning`` not yet run, and no torchmetrics.

    Where a program has imported either already, it is left as it is.
    """
    spec = PathFinder.find_spec("lightning")
    if spec is not None:
        sys.modules.setdefault("lightning", module_from_spec(spec))  # knows where its parts are, and that is all
    blocked = "torchmetrics" not in sys.modules
    if blocked:
        sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        yield
    finally:
        if blocked:
            del sys.modules["torchmetrics"]


with _fabric_alone():
    from lightning.fabric import Fabric as Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment as LightningEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment as TorchElasticEnvironment
    from lightning.fabric.strategies.ddp import DDPStrategy as DDPStrategy
    from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy as DeepSpeedStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as ModelParallelStrategy
    from lightning.fabric.utilities.seed import reset_seed as reset_seed
