"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv:1910.02054) as an engine: stages 2 and 3, with offload to host memory.

Checkpoints are written in the same form as every other strategy's: ZeRO's flat partitions are put together
into tensors by the parameters' names, so a run may stop under ZeRO and go on under DDP or FSDP2 and the other
way round, on any number of ranks, and nothing of DeepSpeed's own format, which is pickle, is written or read.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param
from deepspeed.utils.tensor_fragment import safe_set_full_optimizer_state, safe_set_local_fp32_param
from deepspeed.utils.tensor_fragment import safe_set_local_optimizer_state as safe_set_local_state
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError
from train.engine import Engine, MakeOptimizers, Values
from train.fabric import DeepSpeedStrategy, reset_seed
from train.settings import RunSettings

OURS = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "bf16", "fp16")  # fmt: skip
"""What a user's JSON may not decide: the run's settings do."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the names that torch and DeepSpeed give them."""


def make_strategy(settings: RunSettings, name: str, cuda: bool, common: dict[str, Any]) -> DeepSpeedStrategy:
    """Fabric's strategy for ``deepspeed-2``, ``deepspeed-3`` or ``deepspeed-3-offload``.

    Raises:
        UserError: ``--deepspeed-config`` cannot be read, or decides what the run's settings decide.
    """
    zero: dict[str, Any] = {"stage": int(name.split("-")[1]), "contiguous_gradients": True, "overlap_comm": cuda}
    if name.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW, on the host too: DeepSpeed's own would be compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,  # only to satisfy DeepSpeed: the loop makes the batches
        "gradient_accumulation_steps": 1,  # the loop sets the boundaries
        "gradient_clipping": settings.optimizer.clip,
    }
    if settings.deepspeed_config is not None:
        config = _overlaid(config, _read_config(Path(settings.deepspeed_config)))
        stage = config["zero_optimization"]["stage"]
        if stage != zero["stage"]:
            raise UserError(
                f"--deepspeed-config {settings.deepspeed_config} asks for ZeRO stage {stage}, but --strategy {name} is "
                f"stage {zero['stage']}; leave the stage out"
            )
    return (DeepSpeedStrategy if cuda else _OnCpu)(config=config, **common)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed-config {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--deepspeed-config {path} holds no JSON object")
    clashing = [key for key in OURS if key in values]
    if clashing:
        raise UserError(
            f"--deepspeed-config {path} sets {', '.join(clashing)}, which the run's own settings decide "
            "(--optimizer.*, --batch-tokens, --micro-batch, --precision); leave it out"
        )
    return values


def _overlaid(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``values`` with those of ``over`` in their place, nested objects merged."""
    merged = dict(values)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlaid(merged[key], value) if nested else value
    return merged


class DeepSpeedEngine(Engine):
    """A model under ZeRO.

    A checkpoint is put together while the training waits. A step is skipped when its loss or gradient norm is not
    finite; spikes are not looked for, because the norm is known only inside DeepSpeed's step.
    """

    asynchronous = False

    def _set_up(
        self, build: Callable[[], nn.Module], values: Values, make_optimizers: MakeOptimizers
    ) -> tuple[nn.Module, Any, list[Optimizer]]:
        strategy = self.fabric.strategy
        assert isinstance(strategy, DeepSpeedStrategy)
        self._stage = 3 if strategy.zero_stage_3 else 2
        with self.fabric.init_module():  # under stage 3 every parameter is cut up as soon as it is made
            raw = build()
        _fill(raw, values)
        (optimizer,) = make_optimizers(raw)
        model, _ = self.fabric.setup(raw, optimizer)
        self._engine = strategy.model
        self._zero = self._engine.optimizer
        self._zero.check_grad_overflow = True  # stage 2 in fp32 would take a step to NaN
        return raw, model, [optimizer]

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Tells DeepSpeed whether the optimiser moves after this micro-batch, which it would otherwise count out."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def update(self, rate: float, clip: float, nll: Tensor) -> tuple[Tensor, Tensor]:
        """Clipping, the check of the norm and the step are DeepSpeed's; ``clip`` stands in its configuration."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self.device)
        return norm, torch.tensor(float(self._zero.overflow), device=self.device)

    def tensors_to_save(self) -> dict[str, Tensor]:
        """Whole tensors in host memory, each on one of the ranks in turn; all ranks must call it together."""
        tensors: dict[str, Tensor] = {}
        if self._states() and self._stage == 2:
            self._link_states()
        for number, (name, parameter) in enumerate(self.raw.named_parameters()):
            self._keep(tensors, number, f"model.{name}", safe_get_full_fp32_param(parameter))
            for key in MOMENTS if self._states() else ():
                self._keep(tensors, number, f"optimizer.{name}.{key}", safe_get_full_optimizer_state(parameter, key))
            for state in self._states()[:1]:
                self._keep(tensors, number, f"optimizer.{name}.step", state["step"])
        return tensors

    def _keep(self, tensors: dict[str, Tensor], number: int, name: str, tensor: Tensor) -> None:
        if number % self.job.world_size == self.job.rank:
            tensors[name] = tensor.detach().to("cpu", copy=True)

    def tensors_to_load(self, stored: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Host memory for every tensor; :meth:`loaded` hands each rank's partition to ZeRO."""
        shapes = {f"model.{name}": _whole_shape(parameter) for name, parameter in self.raw.named_parameters()}
        moments = {name: shape for name, shape in stored.items() if name.startswith("optimizer.")}
        self._buffers = {name: torch.zeros(shape) for name, shape in (shapes | moments).items()}
        return self._buffers

    def weights_to_load(self) -> dict[str, Tensor]:
        """The same for the weights alone."""
        return self.tensors_to_load({})

    @torch.no_grad()
    def loaded(self) -> None:
        """Hand each rank's partition of what was read to ZeRO."""
        steps = [tensor for name, tensor in self._buffers.items() if name.endswith(".step")]
        if steps:
            self._make_states(steps[0])
        for name, parameter in self.raw.named_parameters():
            self._put(parameter, self._buffers[f"model.{name}"], None)
            for key in MOMENTS if steps else ():
                self._put(parameter, self._buffers[f"optimizer.{name}.{key}"], key)
        self._buffers = {}
        if self._stage == 3:
            self._refresh_stage_3()

    def _flats(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, one for each group of parameters."""
        zero = self._zero
        return list(zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups)

    def _states(self) -> list[dict[str, Tensor]]:
        """AdamW's state of each partition; none before the first step."""
        states = [self._zero.optimizer.state.get(flat, {}) for flat in self._flats()]
        return states if all("step" in state for state in states) else []

    def _make_states(self, step: Tensor) -> None:
        """What AdamW makes in its first step, for a run that goes on."""
        for flat in self._flats():
            state = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._zero.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **state}
        if self._stage == 2:
            self._link_states()

    def _link_states(self) -> None:
        """Let stage 2 find each parameter's place in the states.

        DeepSpeed does so once, after the step of the first group of parameters, when those of the others do
        not exist yet, and then finds none of theirs.
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Give a parameter's fp32 value, or with ``key`` one of its moments."""
        if self._stage == 2:
            value = value.to(parameter.device)
            if key is not None:
                safe_set_full_optimizer_state(parameter, value, key)
                return
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
            return
        size = parameter.ds_tensor.ds_numel  # the last rank's part is filled up with zeros
        part = value.flatten()[self.job.rank * size :][:size]
        part = nn.functional.pad(part, (0, size - len(part)))
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_state(parameter, part, key)

    def _refresh_stage_3(self) -> None:
        """Bring the weights that are computed with up to the fp32 partitions."""
        zero = self._zero
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones, which ZeRO keeps whole
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape before ZeRO-3 cut it up."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@torch.no_grad()
def _fill(model: nn.Module, values: Values) -> None:
    """Give every parameter its value, gathering those that stage 3 has cut up: an assignment to one of
    those would silently go nowhere."""
    for name, parameter in model.named_parameters():
        cut = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if cut else nullcontext():
            if not cut or torch.distributed.get_rank() == 0:
                parameter.copy_(values(name, _whole_shape(parameter)))


class _OnCpu(DeepSpeedStrategy):
    """Fabric's strategy without its insistence on CUDA, for the tests: DeepSpeed itself runs on gloo."""

    def setup_environment(self) -> None:
        # A kernel that would be compiled now, for a minute, and that gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def _setup_distributed(self) -> None:
        reset_seed()
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        if not self._config_initialized:
            self._format_config()
            self._config_initialized = True

    def _initialize_engine(self, model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None) -> Any:
        engine, optimizer, _, scheduler = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
        return engine, optimizer, scheduler
