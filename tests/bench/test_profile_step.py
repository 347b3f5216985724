from bench.profile_step import Span, busy, kind_of


def test_kernels_are_told_apart_by_their_names() -> None:
    kinds = {
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
        "triton_red_fused_exp_logsumexp_scatter_3": "loss",
        "triton_poi_fused__unsafe_view_mul_silu_split_8": "norms, rotary, activations",
        "multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser and clipping",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "ncclDevKernel_AllReduce": "other",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_time_in_which_two_kernels_run_counts_once() -> None:
    spans = [Span("a", 0.0, 2.0), Span("b", 1.0, 1.5), Span("c", 1.5, 3.0), Span("d", 5.0, 6.0)]
    assert busy(reversed(spans)) == 4.0
