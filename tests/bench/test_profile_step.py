import time

import pytest

from bench.floor import least
from bench.profile_step import Span, busy, kind_of, kind_within, profile_steps
from tests.bench.test_train_gpu import CONFIG, setting


def test_kernels_are_told_apart_by_their_names() -> None:
    kinds = {
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
        "triton_red_fused_exp_logsumexp_scatter_3": "loss",
        "aten::addmm_": "matrix products",
        "graph_0_cpp_fused_add_mean_mul_pow_rsqrt_0": "norms, rotary, activations",
        "triton_poi_fused__unsafe_view_mul_silu_split_8": "norms, rotary, activations",
        "multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser and clipping",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "ncclDevKernel_AllReduce": "other",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_time_in_which_two_kernels_run_counts_once() -> None:
    spans = [Span("a", 0.0, 2.0), Span("b", 1.0, 1.5), Span("c", 1.5, 3.0), Span("d", 5.0, 6.0)]
    assert busy(reversed(spans)) == 4.0


def test_on_a_cpu_the_caller_tells_the_loss_and_the_optimiser() -> None:
    loss, optimiser = ["aten::exp", "ChunkedCrossEntropy"], ["aten::matmul", "Optimizer.step#Muon.step"]
    assert kind_within("aten::exp_", loss) == "loss"
    assert kind_within("aten::mm", loss) == "matrix products"
    assert kind_within("aten::bmm", optimiser) == "optimiser and clipping"
    assert kind_within("aten::exp_", ["MulBackward0"]) == "norms, rotary, activations"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_is_shared_out(optimizer: str) -> None:
    found = profile_steps(setting(optimizer=optimizer), 2, time.process_time)
    assert list(found.parts) == ["batch", "forward", "backward", "clipping", "optimiser"]
    assert all(seconds > 0 for seconds in found.parts.values())
    assert least(CONFIG, 64, 32, 4, optimizer).keys() <= found.kinds.keys()
    assert sum(found.kinds.values()) == pytest.approx(found.wall)
    assert sum(found.names.values()) == pytest.approx(found.wall)
    assert ("optimiser and clipping: aten::bmm" in found.names) == (optimizer == "muon")
