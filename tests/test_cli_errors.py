"""Bad arguments of commands: one line with the option and the value, status 2, and nothing is loaded or measured."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bitdecoding import bench, bench_model, demo, evaluate, tune
from bitdecoding.cli import COMMANDS, main

NUMBERS = ("0", "-1", "x", "", "1.5", "nan", "99999999999999999999", "1e3", "²")
SEEDS = ("-1", "x", "99999999999999999999")
SHAPES = ("", ";", "8,32", "a,b,c,d", "1,32,5,100", "0,32,8,100", "1,-32,8,100", "1,32,0,1", "1,32,8,0", "1,32,8,1.5")
SHAPES += ("raggedx", "1,32,8,100;x", "1,32,8,99999999999", "99999999,1,1,1", "1,2,3,4,5")
POLICIES = ("kv5", "", "kv4:recent=x", "kv4:recent=1:recent=2", "kv4:hadamard=maybe")
POLICIES += ("FOLDER/none.json", "FOLDER/bad.json")
DEVICES = ("x", "", "meta", "mps", "cuda:99")
TEXTS = ("FOLDER/none", "FOLDER", "FOLDER/latin")
FOLDERS = ("FOLDER/bad.json", "FOLDER/bad.json/x")
CASES = {  # a command with its other arguments -> option -> values
    ("bench", "--device", "cpu"): {
        "--shapes": SHAPES,
        "--suite": ("x", ""),
        "--presets": ("kv5", ""),
        "--head-dim": (*NUMBERS, "80", "32"),
        "--rounds": NUMBERS,
        "--ceiling": ("0", "x", "", "nan", "inf", "-3"),
        "--dtype": ("float32",),
        "--out": ("FOLDER", "FOLDER/bad.json/x"),
        "--load": ("FOLDER", "FOLDER/none", "FOLDER/latin", "FOLDER/bad.json"),
        "--device": DEVICES,
    },
    ("bench-model", "--device", "cpu", "--shape", "tiny", "--batches", "1", "--out", "FOLDER/out"): {
        "--layers": (*NUMBERS, "3"),
        "--lengths": (*NUMBERS, "200000"),
        "--policies": POLICIES,
        "--rivals": ("x",),
        "--compile": ("x",),
        "--inductor": ("x",),
        "--searches": (*NUMBERS, "1000"),
        "--steps": (*NUMBERS, "1000"),
        "--shape": ("x",),
        "--batches": (*NUMBERS, "largest", "99999999"),
        "--device": DEVICES,
        "--out": FOLDERS,
    },
    ("tune",): {
        "--presets": ("kv5",),
        "--head-dim": (*NUMBERS, "80"),
        "--device": [n for n in NUMBERS if n != "0"],
        "--rounds": NUMBERS,
        "--dtype": ("x",),
        "--arch": ("sm80",),  # with nothing that asks for another than the GPU's
    },
    ("tune", "--compile-only", "--arch", "sm80"): {
        "--arch": ("sm70", "x", ""),
        "--shapes": SHAPES,
        "--table": ("FOLDER", "FOLDER/bad.json/x"),
    },
    ("eval", "--device", "cpu", "--out", "FOLDER/out"): {
        "--text": TEXTS,
        "--policies": POLICIES,
        "--calibrate": ("x", "", "nan", "inf", "-1", "0", "2.8:x", "2.8:recent=x", ":"),
        "--tokens": (*NUMBERS, "100"),
        "--segments": NUMBERS,
        "--skip": ("-1", "x", "8192", "8100"),
        "--needle": NUMBERS,
        "--generate": ("-1", "1", "3", "x"),
        "--seed": SEEDS,
        "--model": ("x", "", "FOLDER"),
        "--device": DEVICES,
        "--out": FOLDERS,
    },
    ("demo", "--device", "cpu", "--out", "FOLDER/out"): {
        "--tokens": (*NUMBERS, "100"),
        "--presets": ("kv5", ""),
        "--preset": ("kv5", ""),
        "--text": TEXTS,
        "--seed": SEEDS,
        "--new-tokens": NUMBERS,
        "--temperature": ("-1", "x", "nan", "inf"),
        "--device": DEVICES,
        "--out": FOLDERS,
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with files that are none of ours. What costs time is gone: reaching it is an error of another kind."""
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for module, name in (
        *((demo, name) for name in ("load_model", "load_text")),
        *((evaluate, name) for name in ("load_model", "load_text", "load_reference_text")),
        *((bench, name) for name in ("read_bandwidth", "measure_shape")),
        *((bench_model, name) for name in ("read_bandwidth", "random_model")),
        (tune, "compile_missing"),
    ):
        monkeypatch.delattr(module, name)
    monkeypatch.setenv("BITDECODING_TUNED", str(tmp_path / "tuned.json"))
    return str(tmp_path)


@pytest.mark.parametrize(("command", "option"), [(c, option) for c, options in CASES.items() for option in options])
def test_one_line_names_option_and_value(command, option, folder, capsys):
    for value in CASES[command][option]:
        value = value.replace("FOLDER", folder)
        assert main([word.replace("FOLDER", folder) for word in (*command, option, value)]) == 2, value
        printed = capsys.readouterr()
        assert printed.out == ""
        line, end, more = printed.err.partition("\n")
        assert (end, more) == ("\n", ""), printed.err
        assert line.startswith(f"bitdecoding {command[0]}: ")
        assert option.lstrip("-") in line
        assert value.rpartition(";")[2] in line or ascii(value) in line


def test_what_is_no_command_or_option(capsys):
    for words in ([], ["nonsense"], *([command, "--nonsense"] for command in COMMANDS)):
        assert main(words) == 2
        line, end, more = capsys.readouterr().err.partition("\n")
        assert line.startswith("bitdecoding")
        assert (end, more) == ("\n", "")


def test_texts_of_one_name(folder, tmp_path, capsys):
    texts = [tmp_path / name / "text" for name in "ab"]
    for text in texts:
        text.parent.mkdir()
        text.write_text("x")
    assert main(["eval", "--device", "cpu", "--text", *map(str, texts)]) == 2
    assert "allowed are files of different names" in capsys.readouterr().err
