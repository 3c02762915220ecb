"""QuantSpec and KernelConfig: values, names, text forms, and the default choice for a problem."""

import copy
import itertools
import json
import pickle

import pytest
from bitdecoding.cute_kernels import config as config_module
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.compile import GPU_ARCHS, MANIFEST_HEAD_DIMS, preset_specs
from bitdecoding.cute_kernels.config import column_tile
from bitdecoding.cute_kernels.layouts import FORMAT_VERSION, GROUPS, block_format
from bitdecoding.cute_kernels.plan import Plan
from bitdecoding.cute_kernels.tile_plan import decode_plan

from bitdecoding import PRESETS, InvalidArgument, KernelConfig, QuantSpec, UnsupportedConfig, preset

NON_DEFAULT_SPEC = {
    "k_bits": 2,
    "v_bits": 8,
    "k_axis": "token",
    "k_group": 64,
    "v_group": 32,
    "k_symmetric": True,
    "v_symmetric": True,
    "k_mean": "block",
    "k_clip": 0.8,
    "v_clip": "mse",
    "rotate_k": True,
    "rotate_v": True,
}
NON_DEFAULT_CONFIG = {
    "arch": "sm80",
    "head_dim": 64,
    "quant": QuantSpec(v_group=64),
    "q_tile": 16,
    "copy": "cp_async",
    "num_warps": 8,
    "warps_per_block": 2,
    "stages": 8,
    "ctas_per_sm": 2,
}


def test_defaults():
    spec = QuantSpec()
    assert (spec.k_bits, spec.v_bits, spec.k_axis, spec.k_group, spec.v_group) == (4, 4, "channel", 128, 128)
    assert (spec.k_symmetric, spec.v_symmetric, spec.k_mean) == (False, False, "none")
    assert (spec.k_clip, spec.v_clip, spec.rotate_k, spec.rotate_v) == ("minmax", "minmax", False, False)
    assert KernelConfig().name() == "decode_sm90a_d128_k4c128_v4g128_q8_mma_sync_bulk_w4x4_s4_c1"


@pytest.mark.parametrize("clip", [0.8, 1.0, "mse", "minmax"])
def test_clip_reads_back_as_given(clip):
    assert QuantSpec(k_clip=clip).k_clip == clip
    assert QuantSpec(v_clip=clip).v_clip == clip
    assert type(QuantSpec(k_clip=clip).k_clip) is type(clip)


@pytest.mark.parametrize(("field", "value"), NON_DEFAULT_SPEC.items())
def test_every_spec_field_counts(field, value):
    spec = QuantSpec(**{field: value})
    assert getattr(spec, field) == value
    assert spec != QuantSpec()
    assert QuantSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("field", NON_DEFAULT_CONFIG)
def test_every_config_field_counts(field):
    # from a configuration that stays valid whichever of its fields changes
    base = {"arch": "sm90a", "quant": QuantSpec(v_group=32), "copy": "cp_async"}
    value = "bulk" if field == "copy" else NON_DEFAULT_CONFIG[field]
    base |= {"head_dim": 64} if field == "quant" else {}
    config = KernelConfig(**base | {field: value})
    assert getattr(config, field) == value
    assert config != KernelConfig(**base)
    assert config.name() != KernelConfig(**base).name()
    assert KernelConfig.from_json(config.to_json()) == config


def test_objects_are_frozen_equal_and_hashable():
    spec, same, other = QuantSpec(**NON_DEFAULT_SPEC), QuantSpec(**NON_DEFAULT_SPEC), QuantSpec()
    assert spec == same
    assert hash(spec) == hash(same)
    assert len({spec, same, other, KernelConfig(quant=other), KernelConfig()}) == 3
    with pytest.raises(AttributeError):
        spec.k_bits = 8
    with pytest.raises(AttributeError):
        KernelConfig().arch = "sm80"


@pytest.mark.parametrize("obj", [QuantSpec(**NON_DEFAULT_SPEC), KernelConfig(**NON_DEFAULT_CONFIG)])
def test_copies(obj):
    for made in (pickle.loads(pickle.dumps(obj)), copy.copy(obj), copy.deepcopy(obj)):
        assert made == obj
        assert type(made) is type(obj)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_bits": 3}, "k_bits=3: allowed are 8, 4, 2"),
        ({"v_bits": 16}, "v_bits=16: allowed are 8, 4, 2"),
        ({"k_axis": "row"}, "k_axis=row: allowed are channel, token"),
        ({"k_group": 16}, "k_group=16: allowed are 32, 64, 128"),
        ({"v_group": 0}, "v_group=0: allowed are 32, 64, 128"),
        ({"k_mean": "all"}, "k_mean=all: allowed are none, block"),
        ({"k_clip": 0.0}, "k_clip=0.0: allowed are 'minmax', 'mse' and factors in (0, 1]"),
        ({"v_clip": 1.5}, "v_clip=1.5: allowed are"),
        ({"v_clip": float("nan")}, "v_clip=nan: allowed are"),
        ({"k_clip": "max"}, "k_clip='max': allowed are"),
    ],
)
def test_spec_errors_name_the_argument(fields, message):
    with pytest.raises(InvalidArgument) as caught:
        QuantSpec(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kind": "encode"}, InvalidArgument, "kind=encode: allowed are decode, append, step, merge"),
        ({"arch": "sm70"}, InvalidArgument, "arch=sm70: allowed are sm80, sm86, sm89, sm90a, sm100, sm120"),
        ({"head_dim": 80}, InvalidArgument, "head_dim=80: allowed are 64, 96, 128, 256"),
        ({"head_dim": 96}, InvalidArgument, "v_group=128: must divide head_dim=96"),
        ({"q_tile": 12}, InvalidArgument, "q_tile=12: allowed are 4 and the multiples of 8 up to 64"),
        ({"q_tile": 0}, InvalidArgument, "q_tile=0"),
        ({"mma": "wmma"}, InvalidArgument, "mma=wmma"),
        ({"copy": "tma"}, InvalidArgument, "copy=tma: allowed are bulk, cp_async"),
        ({"num_warps": 0}, InvalidArgument, "num_warps=0: allowed are 1 to 16"),
        ({"num_warps": 6}, InvalidArgument, "warps_per_block=4: must divide num_warps=6"),
        ({"warps_per_block": 3}, InvalidArgument, "warps_per_block=3: allowed are 1, 2, 4"),
        ({"stages": 0}, InvalidArgument, "stages=0: allowed are 1 to 32"),
        (
            {"num_warps": 8, "stages": 3},
            InvalidArgument,
            "stages=3: must be a multiple of num_warps / warps_per_block=2",
        ),
        ({"ctas_per_sm": 0}, InvalidArgument, "ctas_per_sm=0: allowed are 1 to 8"),
        ({"ctas_per_sm": 3}, UnsupportedConfig, "sm90a has 76800 with ctas_per_sm=3"),
        ({"kind": "step", "mma": "wgmma"}, InvalidArgument, "mma=wgmma: allowed are mma_sync"),
        ({"kind": "step", "num_warps": 2, "warps_per_block": 2}, InvalidArgument, "num_warps=2: allowed are 4, 8, 12"),
        ({"kind": "step", "num_warps": 6}, InvalidArgument, "num_warps=6: allowed are 4, 8, 12, 16"),
        (
            {"kind": "step", "stages": 2},
            UnsupportedConfig,
            "stages=2: kind=step packs a block in the memory of the ring",
        ),
        ({"kind": "step", "stages": 12}, UnsupportedConfig, "stages=12: the kernel would need"),
        ({"kind": "append", "stages": 2}, InvalidArgument, "stages=2: kind=append has no tiling, allowed is 4"),
        ({"kind": "merge", "stages": 2}, InvalidArgument, "stages=2: kind=merge has no tiling"),
        ({"kind": "merge", "quant": QuantSpec(k_bits=2)}, InvalidArgument, "quant=k2c128_v4g128: allowed are k4c128"),
        ({"kind": "append", "copy": "cp_async"}, InvalidArgument, "copy=cp_async: kind=append has no tiling"),
        ({"arch": "sm80"}, UnsupportedConfig, "copy=bulk: needs sm90a or later"),
        ({"stages": 14}, UnsupportedConfig, "stages=14: the kernel would need"),
    ],
)
def test_config_errors_name_the_argument(fields, error, message):
    config = KernelConfig(**fields)
    for method in (config.validate, config.name):
        with pytest.raises(error) as caught:
            method()
        assert message in str(caught.value)


def test_a_block_has_a_head_dim():
    QuantSpec().validate(0)  # whatever it will be
    for head_dim in (0, -64, 80):
        with pytest.raises(InvalidArgument, match=f"head_dim={head_dim}: allowed are"):
            QuantSpec().block_bytes(head_dim)


@pytest.mark.parametrize("text", ["", "[]", '{"k_bits": 5}', '{"k_bitz": 4}', '{"k_bits": "4"}', "{"])
def test_damaged_json(text):
    with pytest.raises(InvalidArgument):
        QuantSpec.from_json(text)


def test_json_is_plain_text():
    values = json.loads(KernelConfig(**NON_DEFAULT_CONFIG).to_json())
    assert values["arch"] == "sm80"
    assert values["quant"]["v_group"] == 64


def sample_of_configs():
    specs = [
        QuantSpec(k_bits=kb, v_bits=vb, k_axis=axis, k_group=g, v_group=vg, k_symmetric=ks, v_symmetric=vs, k_mean=mean)
        for kb, vb, axis, g, vg, ks, vs, mean in itertools.product(
            (8, 4, 2), (4, 2), ("channel", "token"), (32, 64), (32, 64), (False, True), (False, True), ("none", "block")
        )
    ]
    tilings = [(4, 4, 1, 1), (4, 4, 2, 1), (4, 2, 2, 1), (8, 4, 2, 1), (2, 2, 1, 2)]
    shapes = itertools.product(("sm90a", "sm100"), (64, 128), (8, 16), ("bulk", "cp_async"), tilings)
    for i, (arch, head_dim, q_tile, copy_kind, (num_warps, warps_per_block, stages, ctas_per_sm)) in enumerate(shapes):
        for spec in specs[i % 7 :: 7]:
            yield KernelConfig(
                arch=arch,
                head_dim=head_dim,
                quant=spec,
                q_tile=q_tile,
                copy=copy_kind,
                num_warps=num_warps,
                warps_per_block=warps_per_block,
                stages=stages,
                ctas_per_sm=ctas_per_sm,
            )


def test_names_are_injective_and_invertible():
    configs = list(sample_of_configs())
    assert len({config.name() for config in configs}) == len(set(configs)) > 3000
    for config in configs[::13]:
        assert KernelConfig.from_name(config.name()) == config


def test_names_of_append_kernels_have_no_tiling():
    config = KernelConfig(
        kind="append", arch="sm80", head_dim=64, quant=QuantSpec(k_bits=2, v_group=32, k_mean="block")
    )
    assert config.name() == "append_sm80_d64_k2c128m_v4g32"
    assert KernelConfig.from_name(config.name()) == config
    assert KernelConfig(kind="append").smem_bytes() == 128 * (2 * 128 + 16) + 512 + 512 + 256
    assert config.smem_bytes() == 128 * (2 * 64 + 16) + 4 * 64 + 1024 * 2


def test_clip_and_rotation_do_not_reach_the_kernel():
    spec = QuantSpec(k_clip=0.5, v_clip="mse", rotate_k=True, rotate_v=True)
    assert spec.for_kernel() == QuantSpec()
    for kind in ("decode", "step", "append"):
        assert KernelConfig(kind=kind, quant=spec).name() == KernelConfig(kind=kind).name()


def test_steps_are_named_as_decodes_are():
    config = KernelConfig(kind="step", arch="sm100", head_dim=64, quant=QuantSpec(k_bits=2, v_group=32), stages=8)
    assert config.name() == "step_sm100_d64_k2c128_v4g32_q8_mma_sync_bulk_w4x4_s8_c1"
    assert KernelConfig.from_name(config.name()) == config == KernelConfig.from_json(config.to_json())
    assert config != KernelConfig.from_name(config.name().replace("step", "decode"))


@pytest.mark.parametrize("arch", GPU_ARCHS)
@pytest.mark.parametrize("head_dim", MANIFEST_HEAD_DIMS)
def test_for_problem_has_steps_of_every_preset(arch, head_dim):
    for name, columns in itertools.product(PRESETS, (1, 8)):
        quant = preset(name, head_dim)[0]
        config = KernelConfig.for_problem(
            head_dim=head_dim, quant=quant, num_q_heads=columns, num_kv_heads=1, arch=arch, kind="step"
        )
        assert (config.kind, config.quant, config.mma) == ("step", quant.for_kernel(), "mma_sync")
        assert config.q_tile in (column_tile(columns), 8)
        assert KernelConfig.from_name(config.name()) == config
        assert config.smem_bytes() == Plan(config).smem_bytes
        assert Plan(config).teams >= 1


@pytest.mark.parametrize("arch", ["sm86", "sm89", "sm120"])
def test_for_problem_says_where_a_step_does_not_fit(arch):
    """With what the user gave, not with a tiling."""
    for bits, columns in itertools.product((8, 4, 2), (1, 8)):
        quant = QuantSpec(k_bits=bits, v_bits=bits, k_group=32, v_group=32)
        sizes = {"head_dim": 256, "quant": quant, "num_q_heads": columns, "num_kv_heads": 1, "arch": arch}
        with pytest.raises(UnsupportedConfig, match=f"head_dim=256: kind=step has no kernel for .* on {arch}"):
            KernelConfig.for_problem(kind="step", **sizes)
        assert KernelConfig.for_problem(**sizes).kind == "decode"


def test_for_problem_has_no_steps_of_many_columns():
    sizes = {"head_dim": 128, "quant": QuantSpec(), "num_kv_heads": 8, "arch": "sm90a", "kind": "step"}
    assert KernelConfig.for_problem(num_q_heads=32, q_len=2, **sizes).q_tile == 8
    for num_q_heads, q_len in ((32, 3), (72, 1)):
        with pytest.raises(UnsupportedConfig, match=f"q_len={q_len}: kind=step has at most 8 query columns"):
            KernelConfig.for_problem(num_q_heads=num_q_heads, q_len=q_len, **sizes)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "decode",
        KernelConfig().name() + "x",
        KernelConfig().name().replace("decode", "append"),
        KernelConfig(kind="append").name().replace("append", "decode"),
        KernelConfig().name().replace("d128", "d0128"),
        KernelConfig().name().replace("_s4_", "_s99999999999999999999_"),
        KernelConfig().name().replace("k4c128", "k4c128ms"),
        KernelConfig().name().replace("sm90a", "sm80"),
    ],
)
def test_names_that_are_none(name):
    with pytest.raises((InvalidArgument, UnsupportedConfig)):
        KernelConfig.from_name(name)


def test_format_version_is_the_same_in_both_languages():
    assert native.function("format_version")() == FORMAT_VERSION


@pytest.mark.parametrize("arch", GPU_ARCHS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_for_problem_fits_every_arch(arch, head_dim, bits):
    v_group = max(group for group in GROUPS if head_dim % group == 0)
    spec = QuantSpec(k_bits=bits, v_bits=bits, v_group=v_group, rotate_k=True, k_clip=0.9)
    config = KernelConfig.for_problem(head_dim=head_dim, quant=spec, num_q_heads=32, num_kv_heads=8, arch=arch)
    config.validate()
    assert config.quant == spec.for_kernel()
    assert config.copy == ("cp_async" if arch in ("sm80", "sm86", "sm89") else "bulk")
    limit = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90a": 227, "sm100": 227, "sm120": 99}[arch] * 1024
    assert block_format(head_dim, spec).block_bytes * config.stages < config.smem_bytes()
    assert (config.smem_bytes() + 1024) * config.ctas_per_sm <= limit + 1024


@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "q_len", "q_tile"),
    [
        (8, 8, 1, 4),
        (32, 8, 1, 4),
        (5, 1, 1, 8),
        (32, 4, 1, 8),
        (36, 4, 1, 16),
        (32, 8, 3, 16),
        (8, 1, 4, 32),
        (64, 1, 1, 64),
        (32, 8, 1024, 128),
    ],
)
def test_for_problem_chooses_the_tile(num_q_heads, num_kv_heads, q_len, q_tile):
    config = KernelConfig.for_problem(
        head_dim=128,
        quant=QuantSpec(),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_len=q_len,
        arch="sm90a",
    )
    assert config.q_tile == q_tile


@pytest.mark.parametrize(
    "fields",
    [
        {},
        NON_DEFAULT_CONFIG,
        {"head_dim": 256, "stages": 2, "num_warps": 8, "q_tile": 16},
        {"q_tile": 4, "num_warps": 12, "warps_per_block": 2, "stages": 6},
        {"mma": "wgmma", "q_tile": 32, "num_warps": 12, "stages": 3},
        {"mma": "wgmma", "q_tile": 32, "num_warps": 16, "warps_per_block": 16, "stages": 3},
        {"mma": "wgmma", "q_tile": 64, "num_warps": 8, "warps_per_block": 4, "stages": 3},
        {"mma": "wgmma", "q_tile": 64, "num_warps": 8, "warps_per_block": 4, "quant": QuantSpec(k_bits=8), "stages": 2},
        {
            "mma": "wgmma",
            "q_tile": 128,
            "num_warps": 8,
            "warps_per_block": 8,
            "head_dim": 64,
            "quant": QuantSpec(k_axis="token", k_group=32, k_mean="block", v_group=32, v_symmetric=True),
        },
        {
            "mma": "wgmma",
            "num_warps": 8,
            "warps_per_block": 8,
            "quant": QuantSpec(k_axis="token", k_group=64, v_group=64),
        },
        {"mma": "wgmma", "head_dim": 256, "quant": QuantSpec(k_axis="token", k_mean="block", v_symmetric=True)},
        {"mma": "wgmma", "head_dim": 64, "quant": QuantSpec(k_group=32, k_mean="block", v_group=64)},
    ],
)
def test_smem_bytes_is_what_the_kernel_plans(fields):
    config = KernelConfig(**fields)
    assert config.smem_bytes() == decode_plan(config).smem_bytes


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"arch": "sm100"}, UnsupportedConfig, "mma=wgmma: needs arch=sm90a, got sm100"),
        ({"copy": "cp_async"}, UnsupportedConfig, "copy=cp_async"),
        ({"head_dim": 96, "quant": QuantSpec(v_group=32)}, UnsupportedConfig, "head_dim=96"),
        ({"quant": QuantSpec(v_group=32)}, UnsupportedConfig, "v_group=32: mma=wgmma has 64 and 128"),
        ({"head_dim": 64, "quant": QuantSpec(v_group=64), "ctas_per_sm": 2}, UnsupportedConfig, "ctas_per_sm=2: mma=w"),
        ({"warps_per_block": 2}, InvalidArgument, "warps_per_block=2"),
        ({"q_tile": 136}, InvalidArgument, "q_tile=136: allowed are the multiples of 8 up to 128"),
        ({"q_tile": 4}, InvalidArgument, "q_tile=4: allowed are the multiples of 8 up to 128"),
        ({"q_tile": 24, "num_warps": 16, "warps_per_block": 16}, UnsupportedConfig, "q_tile=24"),
        ({"q_tile": 72}, InvalidArgument, "q_tile=72: allowed are 64, 128"),
        ({"q_tile": 64, "num_warps": 12, "warps_per_block": 4}, InvalidArgument, "num_warps=12"),
        ({"q_tile": 128, "num_warps": 8, "warps_per_block": 4}, InvalidArgument, "warps_per_block=4: allowed are 8"),
        ({"q_tile": 64, "num_warps": 8, "warps_per_block": 4, "head_dim": 256}, UnsupportedConfig, "head_dim=256"),
    ],
)
def test_wgmma_is_checked(fields, error, message):
    with pytest.raises(error, match=message):
        KernelConfig(**({"mma": "wgmma"} | fields)).validate()


@pytest.mark.parametrize(("fields", "moves"), [({}, True), ({"ctas_per_sm": 2}, False), ({"arch": "sm120"}, False)])
def test_registers_move_only_within_a_whole_sm(fields, moves):
    quant = QuantSpec(k_bits=2, v_bits=2, v_group=64)
    config = KernelConfig(**({"arch": "sm90a", "head_dim": 64, "quant": quant, "num_warps": 12, "warps_per_block": 2,
                              "stages": 6} | fields))  # fmt: skip
    config.validate()
    assert decode_plan(config).moves_registers == moves


def test_for_problem_rejects_head_counts():
    with pytest.raises(InvalidArgument, match="num_q_heads=33: must be a multiple of num_kv_heads=8"):
        KernelConfig.for_problem(head_dim=128, quant=QuantSpec(), num_q_heads=33, num_kv_heads=8, arch="sm90a")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        *[((7, 5), ""), ((8, 0), "sm80"), ((8, 6), "sm86"), ((8, 7), "sm80"), ((8, 9), "sm89")],
        *[((9, 0), "sm90a"), ((10, 3), "sm100"), ((11, 0), ""), ((12, 0), "sm120")],
    ],
)
def test_arch_of_a_device(capability, arch):
    assert native.function("arch_of")(*capability) == arch


def test_unsupported_device_is_a_typed_error(monkeypatch):
    old = {"arch": "", "name": "Tesla T4", "major": 7, "minor": 5}
    monkeypatch.setattr(config_module, "_device_info", lambda index: old)
    with pytest.raises(UnsupportedConfig, match=r"Tesla T4.*7\.5"):
        config_module.device_arch(0)


@pytest.mark.parametrize("head_dim", MANIFEST_HEAD_DIMS)
def test_a_build_compiles_the_formats_of_the_presets(head_dim):
    """The manifest lists them by itself, since kernels do not know the Python package."""
    assert {preset(name, head_dim)[0].for_kernel() for name in PRESETS} == set(preset_specs(head_dim))
