"""Damaged and hostile artifacts: all refused with a named error; none crashes, hangs, runs anything or eats memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.crashing import FORKS

from atom_lens import aip_converter, load_atoms
from atom_lens.storage.sealed import MANIFEST, seal

ATTACKS = Path(__file__).parent / "attacks"
GOOD = Path(__file__).parent / "artifacts" / "format-1" / "run" / "blocks.1.hook_resid_post"
FILES = ["cfg.json", "sae_weights.safetensors", "aip.safetensors"]
KINDS = sorted(path.name for path in ATTACKS.iterdir() if path.is_dir())


def good_copy(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in (*FILES, MANIFEST, "report.json"):
        shutil.copy(GOOD / name, folder / name)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_refused_kinds(kind: str, tmp_path: Path) -> None:
    folder = good_copy(tmp_path / "atoms")
    load_atoms(folder)
    for file in (ATTACKS / kind).iterdir():
        shutil.copy(file, folder / file.name)
    sealed = [] if (ATTACKS / kind / MANIFEST).exists() else [True]
    for again in (False, *sealed):
        if again:
            seal(folder, FILES)
        for load in (load_atoms, lambda path: SAE.load_from_disk(path, converter=aip_converter)):
            with pytest.raises(ValueError) as refused:
                load(folder)
            text = str(refused.value)
            assert str(folder) in text and "\n" not in text.strip(), text
            assert len(text) < 1000 and "Traceback" not in text
            if again:
                assert "SHA-256" not in text and "bytes, " not in text, "only its seal gave it away"
    assert not Path("/tmp/atom-lens-was-here").exists()


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    for name in (*FILES, MANIFEST):
        folder = good_copy(tmp_path / name)
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
            (folder / name).unlink(missing_ok=True) if not (folder / name).is_dir() else (folder / name).rmdir()
            make(folder / name)
            with pytest.raises(ValueError, match="is not a regular file"):
                load_atoms(folder)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}' does not exist"):
            load_atoms(folder)
    # A link to the very file is how the Hub's cache keeps it.
    folder = good_copy(tmp_path / "linked")
    (folder / "cfg.json").unlink()
    (folder / "cfg.json").symlink_to(GOOD / "cfg.json")
    load_atoms(folder)


def test_marks_of_this_package_cannot_be_taken_off_one_by_one(tmp_path: Path) -> None:
    """Without manifest and metric the config still says whose it is: no silent Euclidean metric."""
    folder = good_copy(tmp_path / "atoms")
    (folder / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json' does not exist"):
        load_atoms(folder)
    (folder / "aip.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json' does not exist"):
        load_atoms(folder)


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one thing at random in the artifact at `folder`; returns what kind of thing."""
    kind = draw.choice(["bytes", "bytes", "header", "tensors", "tensors", "metadata", "config", "config", "manifest"])
    name = draw.choice([*FILES, MANIFEST]) if kind == "bytes" else FILES[draw.randrange(1, 3)]
    path = folder / name
    data = bytearray(path.read_bytes())
    if kind == "bytes":
        how = draw.choice(["flip", "cut", "zero", "swap", "grow", "none", "noise"])
        at, other = sorted(draw.sample(range(len(data)), 2))
        if how == "flip":
            # Flips in a manifest that hit a blank or the name of a file that is not read would change nothing.
            at = data.index(b"sha256", data.index(b"cfg.json")) + 12 if name == MANIFEST else at
            data[at] ^= 1 << draw.randrange(3)
        elif how == "cut":
            data = data[:at]
        elif how == "zero":
            data[0 : at + 1] = bytes(at + 1)
        elif how == "swap":
            data[at], data[other] = data[other], data[at]
            if data == path.read_bytes() or name == MANIFEST:
                data[0] ^= 1
        elif how == "grow":
            data += (b"}" if path.suffix == ".json" else b"") + bytes(draw.randrange(1, 4096))
        elif how == "noise":
            data = bytearray(draw.randbytes(len(data)))
        path.write_bytes(data)
        if how == "none":
            path.unlink()
        return f"{how} {name}"
    if kind == "header":
        length = draw.choice([0, 1, 7, draw.randrange(1 << 16), (1 << 62) + draw.randrange(1 << 30), 10**8, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", length) + data[8:])
    elif kind in ("tensors", "metadata"):
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        key = draw.choice(sorted(state))
        if kind == "tensors":
            state, what = mutated_tensors(state, key, draw)
            kind = f"{what} {name}"
        else:
            name, path = "aip.safetensors", folder / "aip.safetensors"
            state = load_file(path)
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["atom_lens"])
            field = draw.choice(sorted(about))
            about[field] = draw.choice([None, [], {}, -1, "x", 1e400, float("nan")][: 4 if field == "source" else 7])
            metadata = {"atom_lens": json.dumps(about)}
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    elif kind == "config":
        cfg = json.loads((folder / "cfg.json").read_text())
        key = draw.choice(sorted(cfg))
        how = draw.choice(["drop", "type", "extra", "metadata"])
        if how == "drop":
            del cfg[key]
        elif how == "type":
            wrong: list[Any] = [None, [], 3.5, -1, 10**30]
            cfg[key] = draw.choice(wrong)
        elif how == "extra":
            cfg[draw.choice(["hook_name", "__init__", "path", "exec", "d_out"])] = draw.choice([1, "x", None])
        else:
            cfg["metadata"][draw.choice(["__class__", "__dict__", "items", "get", "keys", "from_dict"])] = "x"
        (folder / "cfg.json").write_text(json.dumps(cfg))
    elif kind == "manifest":
        found = json.loads((folder / MANIFEST).read_text())
        key = draw.choice(FILES)
        how = draw.choice(["unlist", "bytes", "sha256", "format", "escape"])
        if how == "unlist":
            del found["files"][key]
        elif how == "format":
            found["format"] = draw.choice([0, 2, "1", None, 1.5, [1]])
        elif how == "escape":
            found["files"][draw.choice(["../", "/", "a/", "./", "~/", "..\\"]) + key] = found["files"][key]
        else:
            found["files"][key][how] = draw.choice([None, -1, "x", 10**18, "0" * 64])
        (folder / MANIFEST).write_text(json.dumps(found))
        return f"manifest {how}"
    seal(folder, FILES)  # as somebody would who means it
    return kind


def mutated_tensors(state: dict[str, torch.Tensor], key: str, draw: random.Random) -> tuple[dict[str, Any], str]:
    what = draw.choice(["value", "dtype", "shape", "missing", "extra", "renamed"])
    value = state[key]
    if what == "value":
        value = value.clone()
        value.view(-1)[draw.randrange(value.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
    elif what == "dtype":
        value = value.to(draw.choice([torch.float16, torch.int8, torch.int64, torch.bool, torch.complex64]))
    elif what == "shape":
        value = draw.choice([value[:-1], value.reshape(1, *value.shape), value.flatten()[:0], torch.cat([value] * 2)])
    elif what == "extra":
        return {**state, draw.choice(["W_skip", "0", "../x", "W_dec.weight"]): value.clone()}, what
    rest = {name: tensor for name, tensor in state.items() if name != key}
    if what == "missing":
        return rest, what
    return {**rest, f"{key}_" if what == "renamed" else key: value}, what


def load_mutated(seed: int, count: int, out: str) -> None:
    """Mutate and load in this process, with its memory limited and what it does watched; write what happened."""
    torch.set_num_threads(1)
    draw, found, seen = random.Random(seed), [], []
    folder = Path(out).parent / "atoms"
    watched = ("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "socket.connect", "pickle.")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(watched) or (event == "open" and ".." in str(arguments[0])):
            seen.append(f"{event} {arguments}")

    load_atoms(good_copy(folder))
    shutil.rmtree(folder)
    sys.addaudithook(watch)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (64 << 20), virtual + (64 << 20)))
    for _ in range(count):
        good_copy(folder)
        kind = mutate(folder, draw)
        signal.alarm(20)  # a hang ends this process, and the test
        try:
            load_atoms(folder)
            found.append((kind, "loaded", ""))
        except (ValueError, FileNotFoundError) as error:
            found.append((kind, "refused", str(error)))
        except BaseException as error:
            found.append((kind, type(error).__name__, str(error)))
        signal.alarm(0)
        shutil.rmtree(folder)
    Path(out).write_text(json.dumps({"found": found, "seen": seen}))


@pytest.mark.slow
def test_500_mutated_artifacts() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.json"
        process = FORKS.Process(target=load_mutated, args=(0, 500, str(out)))
        process.start()
        process.join()
        assert process.exitcode == 0, "the process crashed, hung or ran out of memory"
        result = json.loads(out.read_text())
        assert result["seen"] == [], "something was run, unpickled, connected to, or opened elsewhere"
        wrong = [one for one in result["found"] if one[1] != "refused"]
        assert not wrong, wrong[:5]
        assert len(result["found"]) == 500
        for kind, _, text in result["found"]:
            assert temporary in text and "\n" not in text.strip() and len(text) < 1000, (kind, text)
        assert len(Counter(kind for kind, *_ in result["found"])) > 25, "too few kinds"
