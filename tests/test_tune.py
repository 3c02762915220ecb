"""`bitdecoding tune` and the table of tuned kernels: stored, merged, looked up, and never a wrong kernel."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from bitdecoding.cute_kernels import compile as compile_module
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.pack import CompiledKernel, read_pack, write_pack
from tqdm import tqdm

import bitdecoding as bd
from bitdecoding import cuda, tune, tuned
from bitdecoding.candidates import LowBitCache, parse_shapes
from bitdecoding.cli import main
from bitdecoding.tuned import Entry, TuningWarning

GPU = "A GPU"
DEFAULT = bd.KernelConfig.for_problem(
    head_dim=128, quant=bd.QuantSpec(), num_q_heads=32, num_kv_heads=8, arch="sm90a"
)  # fmt: skip
PROBLEM = tuned.problem(128, bd.QuantSpec(), 4)
find_kernel = native.function("find_kernel")


def config(**fields) -> bd.KernelConfig:
    return bd.KernelConfig(**({"num_warps": 2, "warps_per_block": 1, "stages": 6} | fields))


def entry(kernel: bd.KernelConfig | str = DEFAULT, us: float = 1.0) -> Entry:
    name = kernel if isinstance(kernel, str) else kernel.name()
    return Entry(name, {"1, 32/8, 1024": us}, DEFAULT.name(), {"1, 32/8, 1024": 2.0})


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """A place for the table in use."""
    path = tmp_path / "folder" / "table.json"
    monkeypatch.setenv("BITDECODING_TUNED", str(path))
    tuned._known.cache_clear()
    cuda._load_tuned_pack.cache_clear()
    return path


def look_up(device: str = GPU, default: bd.KernelConfig = DEFAULT, columns: int = 4) -> bd.KernelConfig | None:
    tuned._known.cache_clear()
    return tuned.lookup(device, default, columns)


@pytest.fixture(autouse=True)
def _quiet():
    """No warning but those that a test expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningWarning)
        yield


# ---------------------------------------------------------------------------------------------- the table


def test_what_is_stored_is_found(table) -> None:
    assert look_up() is None
    tuned.store(table, GPU, {PROBLEM: entry(config())})
    assert look_up() == config()
    assert look_up("another GPU") is None
    assert look_up(columns=16) is None
    assert look_up(default=bd.KernelConfig(quant=bd.QuantSpec(v_group=64))) is None
    assert [path.name for path in table.parent.iterdir()] == ["table.json"]


def test_results_are_merged(table) -> None:
    other = tuned.problem(128, bd.QuantSpec(), 16)
    tuned.store(table, GPU, {PROBLEM: entry(config()), other: entry()})
    tuned.store(table, "another GPU", {PROBLEM: entry(us=4.0)})
    tuned.store(table, GPU, {PROBLEM: entry(config(stages=2))})
    assert tuned.read(table) == {
        GPU: {PROBLEM: entry(config(stages=2)), other: entry()},
        "another GPU": {PROBLEM: entry(us=4.0)},
    }
    assert tuned.facts() == {"path": str(table), "problems": 3}


@pytest.mark.parametrize(
    ("heads", "columns"), [((32, 8), 4), ((32, 32), 4), ((16, 2), 8), ((9, 1), 16), ((8, 2, 3), 16), ((64, 1, 4), 256)]
)
def test_problems_differ_in_whole_column_tiles(heads: tuple[int, ...], columns: int) -> None:
    assert tuned.query_columns(*heads) == columns


def test_no_table_is_wanted(table, monkeypatch, capsys) -> None:
    tuned.store(table, GPU, {PROBLEM: entry(config())})
    monkeypatch.setenv("BITDECODING_TUNED", "")
    assert look_up() is None
    assert tuned.pack_path() is None
    assert main(["tune", "--dry-run", "--arch", "sm90a"]) == 2
    assert "BITDECODING_TUNED" in capsys.readouterr().err


def test_the_default_place(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("BITDECODING_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.table_path() == tmp_path / "bitdecoding" / "tuned.json"


def damaged(**changes) -> str:
    sound = {"kernel": config().name(), "us": {"a": 1.0}, "default": DEFAULT.name(), "default_us": {"a": 2}}
    values = {"version": 1, "sources": tuned.source_digest(), "devices": {GPU: {PROBLEM: sound}}}
    if "entry" in changes:
        values["devices"][GPU][PROBLEM] = changes["entry"](sound)
    return json.dumps(values | {key: value for key, value in changes.items() if key != "entry"})


DAMAGED = {
    "empty": "",
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "no version": "{}",
    "another version": damaged(version=2),
    "other kernels": damaged(sources="0" * 16),
    "no devices": damaged(devices=None),
    "devices are text": damaged(devices="x"),
    "a device is a list": damaged(devices={GPU: []}),
    "an entry is a number": damaged(devices={GPU: {PROBLEM: 1}}),
    "a field is missing": damaged(entry=lambda e: {k: v for k, v in e.items() if k != "us"}),
    "a field too many": damaged(entry=lambda e: e | {"x": 1}),
    "a name is no text": damaged(entry=lambda e: e | {"kernel": 1}),
    "a time is no number": damaged(entry=lambda e: e | {"us": {"a": "b"}}),
    "times are a list": damaged(entry=lambda e: e | {"us": [1.0]}),
}


def test_the_sound_form_of_the_damaged_ones(table) -> None:
    table.parent.mkdir()
    table.write_text(damaged())
    assert look_up() == config()


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_table_that_cannot_be_used(text: str, table) -> None:
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(bd.CacheFormatError, match="table.json"):
        tuned.read(table)
    with pytest.warns(TuningWarning, match="default kernels are used"):
        assert look_up() is None
    with pytest.warns(TuningWarning, match="a new table takes its place"):
        tuned.store(table, GPU, {PROBLEM: entry(config())})
    assert look_up() == config()


def test_a_table_that_is_no_file(table) -> None:
    table.mkdir(parents=True)
    with pytest.warns(TuningWarning, match="cannot be read"):
        assert look_up() is None
    with pytest.raises(bd.InvalidArgument, match="cannot be written"), pytest.warns(TuningWarning):
        tuned.store(table, GPU, {PROBLEM: entry()})
    assert list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize(
    "kernel",
    [
        "",
        "report",
        config().name() + "0",
        config(head_dim=64, quant=bd.QuantSpec(v_group=64)),
        config(quant=bd.QuantSpec(k_bits=2)),
        config(arch="sm100"),
        config(arch="sm80", copy="cp_async", stages=2),
        DEFAULT.name().replace("s8", "s99"),
    ],
)
def test_a_kernel_of_another_problem_is_never_taken(kernel, table) -> None:
    tuned.store(table, GPU, {PROBLEM: entry(kernel)})
    with pytest.warns(TuningWarning):
        assert look_up() is None


# ---------------------------------------------------------------------------------------------- the choice


def compiled(kernel: bd.KernelConfig) -> CompiledKernel:
    return CompiledKernel(
        kernel.name(), "entry", kernel.name().encode(), 160, kernel.smem_bytes(), 128, kernel.ctas_per_sm
    )


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine with a GPU, as far as the choice of a kernel goes, and no compiler."""
    monkeypatch.setattr(cuda, "device_arch", lambda device: "sm90a")
    monkeypatch.setattr(cuda, "_device_info", lambda device: {"name": GPU})
    monkeypatch.setattr(cuda, "dsl_version", lambda: None)


def choose() -> bd.KernelConfig:
    tuned._known.cache_clear()
    return cuda.choose(0, 128, bd.preset("kc4")[0], 32, 8)


def test_the_winner_is_used_and_found_beside_the_table(table, gpu) -> None:
    assert choose() == DEFAULT
    winner = config(q_tile=40)
    tuned.store(table, GPU, {PROBLEM: entry(winner)})
    with pytest.warns(TuningWarning, match="the default kernel is used"):  # it is nowhere
        assert choose() == DEFAULT
    write_pack(tuned.pack_path(), [compiled(winner)], {})
    cuda._load_tuned_pack.cache_clear()
    assert choose() == winner
    assert cuda.kernel_handle(winner) == find_kernel(winner.name()) >= 0


def test_a_damaged_pack_beside_the_table(table, gpu) -> None:
    tuned.store(table, GPU, {PROBLEM: entry(config(q_tile=48))})
    tuned.pack_path().write_bytes(b"BDPACK 1\n7\n")
    used, damaged = "the default kernel is used", "not a usable kernel pack"
    with pytest.warns(TuningWarning, match=used), pytest.warns(TuningWarning, match=damaged):
        assert choose() == DEFAULT


def test_packs_of_other_kernel_sources_are_not_looked_at(table, monkeypatch) -> None:
    now = tuned.pack_path()
    monkeypatch.setattr(tuned, "source_digest", lambda: "0" * 16)
    assert tuned.pack_path() != now


# ---------------------------------------------------------------------------------------------- candidates

SHAPES = "1,8,2,300;2,4,4,256;1,12,1,40"


@pytest.mark.parametrize("arch", compile_module.GPU_ARCHS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_candidates(arch: str, head_dim: int) -> None:
    problems = tune.find_problems(["kc4", "kv2"], head_dim, parse_shapes(SHAPES), arch)
    formats = [bd.preset(name, head_dim)[0].name() for name in ("kc4", "kv2")]
    assert [p.key for p in problems] == [f"d{head_dim}_{name}_q{columns}" for name in formats for columns in (4, 16)]
    for problem in problems:
        assert [shape.num_kv_heads for shape in problem.shapes] == ([1] if problem.key.endswith("q16") else [2, 4])
        assert problem.configs[0] == problem.default
        assert len({config.name() for config in problem.configs}) == len(problem.configs) >= 3
        for candidate in problem.configs:
            candidate.validate()
            assert (candidate.arch, candidate.head_dim, candidate.quant) == (
                arch, head_dim, bd.preset(problem.preset, head_dim)[0].for_kernel(),
            )  # fmt: skip
        assert {c.q_tile for c in problem.configs} <= ({8, 16} if problem.key.endswith("q16") else {4, 8})


def test_dry_run_lists_them(table, capsys) -> None:
    assert main(["tune", "--dry-run", "--arch", "sm89", "--presets", "kc2", "--head-dim", "96"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    (problem,) = tune.find_problems(["kc2"], 96, parse_shapes(tune.MAIN_CUDA), "sm89")
    assert first.startswith(problem.key)
    assert [line.split()[0] for line in lines] == [candidate.name() for candidate in problem.configs]
    assert lines[0].endswith("the default")
    assert not table.exists()


def test_errors(table, capsys) -> None:
    for arguments, said in (
        (["--arch", "sm90a"], "--arch"),
        (["--rounds", "0"], "--rounds: '0': allowed are integers from 1"),
        (["--presets", "kc3", "--dry-run", "--arch", "sm90a"], "kc3"),
        (["--dry-run", "--arch", "sm70"], "sm70"),
        (["--dry-run", "--arch", "sm90a", "--shapes", "1,2"], "1,2"),
    ):
        assert main(["tune", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(table, capsys) -> None:
    assert main(["tune"]) == 2
    assert "bitdecoding tune: " in capsys.readouterr().err


def test_what_is_missing_is_compiled_once(table, monkeypatch) -> None:
    (problem,) = tune.find_problems(["kc2"], 96, parse_shapes("1,8,2,300"), "sm120")
    asked = []

    def compile_all(configs):
        asked.append([each.name() for each in configs])
        return [compiled(each) for each in configs]

    monkeypatch.setattr(compile_module, "compile_all", compile_all)
    pack = tuned.pack_path()
    some, rest = problem._replace(configs=problem.configs[:3]), problem.configs[3:]
    monkeypatch.setattr(tune, "dsl_version", lambda: None)
    tune.compile_missing([some], pack)
    assert not pack.exists()
    monkeypatch.setattr(tune, "dsl_version", lambda: "4.8.1")
    tune.compile_missing([some], pack)
    tune.compile_missing([problem], pack)
    tune.compile_missing([problem], pack)
    assert asked == [[c.name() for c in some.configs], [c.name() for c in rest]]
    assert [kernel.name for kernel in read_pack(pack)[1]] == [c.name() for c in problem.configs]
    assert min(find_kernel(c.name()) for c in problem.configs) >= 0


# ---------------------------------------------------------------------------------------------- measuring


def cpu_problem() -> tune.Problem:
    (problem,) = tune.find_problems(["kc4"], 64, parse_shapes("1,8,2,300;2,4,4,256"), "sm90a")
    return problem._replace(configs=problem.configs[:3])


def measure(problem: tune.Problem) -> tune.Measured:
    with tqdm(disable=True) as bar:
        return tune.measure(problem, 64, torch.float16, torch.device("cpu"), 2, bar)


def test_measuring_takes_every_kernel_and_shape() -> None:
    problem = cpu_problem()
    measured = measure(problem)
    assert list(measured) == [candidate.name() for candidate in problem.configs]
    for times in measured.values():
        assert list(times) == ["1, 8/2, 300", "2, 4/4, 256"]
        assert min(times.values()) > 0


def test_a_kernel_that_is_wrong_or_cannot_never_wins(monkeypatch, capsys) -> None:
    problem = cpu_problem()
    _, wrong, cannot = problem.configs
    error = LowBitCache.error

    def errs(self, kernel=None):
        if kernel == cannot:
            raise bd.CudaError("no room")
        return float("nan") if kernel == wrong and self.shape.batch == 2 else error(self, kernel)

    monkeypatch.setattr(LowBitCache, "error", errs)
    assert list(measure(problem)) == [problem.default.name()]
    said = capsys.readouterr().err
    assert f"{wrong.name()} left out: relative error nan" in said
    assert f"{cannot.name()} left out: no room" in said
    monkeypatch.setattr(LowBitCache, "error", lambda self, kernel=None: 1.0)
    with pytest.raises(bd.KernelNotFound, match="the default kernel"):
        measure(problem)


def test_the_least_geometric_mean_wins() -> None:
    problem = cpu_problem()
    a, b, c = (candidate.name() for candidate in problem.configs)
    times = {a: {"x": 1.0, "y": 100.0}, b: {"x": 1.2, "y": 80.0}, c: {"x": 2.0, "y": 60.0}}
    assert tune.best(problem, times) == Entry(b, times[b], a, times[a])
    assert tune.best(problem, {b: times[a], a: times[a]}).kernel == a
    lines = tune.format_result(problem, times).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [b, a, c]
    assert lines[1].split()[:3] == ["0.980", "1.2", "80.0"]


def test_the_whole_command(table, monkeypatch, capsys) -> None:
    """On a GPU that the CPU backend plays."""
    monkeypatch.setattr(tune, "device_arch", lambda index: "sm90a")
    monkeypatch.setattr(tune, "_gpu", lambda index: (torch.device("cpu"), GPU))
    monkeypatch.setattr(tune, "compile_missing", lambda problems, pack: None)
    monkeypatch.setattr(
        tune, "kernels_for", lambda default, columns: [default, config(head_dim=64, quant=default.quant)]
    )
    assert main(["tune", "--presets", "kc4", "kv4", "--head-dim", "64", "--shapes", SHAPES, "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"wrote {table}\n")
    entries = tuned.read(table)[GPU]
    assert sorted(entries) == sorted(
        tuned.problem(64, bd.preset(name, 64)[0], columns) for name in ("kc4", "kv4") for columns in (4, 16)
    )
    for key, found in entries.items():
        assert key in out
        assert bd.KernelConfig.from_name(found.kernel).head_dim == 64
        assert set(found.us) == ({"1, 12/1, 40"} if key.endswith("q16") else {"1, 8/2, 300", "2, 4/4, 256"})


@pytest.mark.gpu
def test_on_a_gpu(table, monkeypatch, capsys) -> None:
    """The default and, with a compiler, a second kernel."""
    every = tune.kernels_for
    monkeypatch.setattr(tune, "kernels_for", lambda default, columns: list(every(default, columns))[:2])
    assert main(["tune", "--presets", "kc4", "--shapes", "1,8,2,300;3,8,8,1000", "--rounds", "2"]) == 0
    (found,) = tuned.read(table)[torch.cuda.get_device_name(0)].values()
    assert len(found.us) == len(found.default_us) == 2
    assert cuda.choose(0, 128, bd.preset("kc4")[0], 8, 2).name() == found.kernel
