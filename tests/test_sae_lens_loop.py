"""Our architectures in sae-lens' own loop: its trainers, runner and command line, from activations to a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    JumpReLUSAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETransformerBridge,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig, TrainStepInput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from atom_lens import (
    AtomicInnerProduct,
    evaluate,
    faithfulness,
    load_atoms,
)
from atom_lens.dictionaries.learning import Learning
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.training.checkpoint import Batches
from atom_lens.training.fit import fit_one

D, F, K, BATCH = 32, 128, 4, 256
HOOK = "blocks.1.hook_resid_post"
# As docs/training.md has it.
COMMAND = "import runpy, atom_lens; runpy.run_module('sae_lens.llm_sae_training_runner', run_name='__main__')"


def planted(n: int, d: int = D, f: int = F, k: int = K) -> torch.Tensor:
    """k of f random directions with coefficients of 0.5 to 1.5, noise, and a mean beside which they are small."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(f, d, generator=generator), dim=1)
    index = torch.rand(n, f, generator=generator).topk(k).indices
    codes = 0.5 + torch.rand(n, k, generator=generator)
    x = torch.nn.functional.embedding_bag(index, atoms, per_sample_weights=codes, mode="sum")
    return x + 0.02 * torch.randn(n, d, generator=generator) + 3 * torch.randn(d, generator=generator)


PLAIN = {"aip_tsae": "JumpReLUSAE", "aip_topk": "TopKSAE", "aip_pursuit": "PursuitSAE"}
ARCHITECTURES = tuple(PLAIN)


def config_of(architecture: str, l0: int, **options: Any) -> Any:
    """A training configuration that asks for that L0."""
    asked = {
        "aip_tsae": {"target_l0": float(l0)},
        "aip_topk": {"k": l0},
        "aip_pursuit": {"k": float(l0), "max_iterations": 2 * l0},
    }
    return get_sae_training_class(architecture)[1](**{**asked[architecture], **options})


def sae(architecture: str = "aip_tsae", k: int = K, **options: Any) -> Any:
    config = config_of(architecture, k, **{"d_in": D, "d_sae": F, **options})
    return get_sae_training_class(architecture)[0](config)


def settings(steps: int, **options: Any) -> SAETrainerConfig:
    """sae-lens' settings for what `Training` says by default; batches that only tell the start come on top."""
    return SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=round(0.05 * steps),
        lr_decay_steps=round(0.3 * steps),
        dead_feature_window=200,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        **options,
    )


def stream(x: torch.Tensor) -> Iterator[torch.Tensor]:
    return (batch["x"] for batch in Batches({"x": x}, BATCH, seed=0))


def measured(atoms: Any, x: torch.Tensor) -> tuple[float, float]:
    """Explained variance, and the mean L0."""
    with torch.no_grad():
        codes = atoms.encode(x)
        return faithfulness(x, atoms.decode(codes)), float((codes > 0).sum(1).double().mean())


@pytest.fixture(scope="module")
def expected() -> float:
    """Held-out explained variance of what `fit` makes of the same rows."""
    x, heldout = planted(24_000).split(20_000)
    training = Training(steps=1500, batch_size=BATCH, device="cpu")
    return measured(fit_one(x, AtomicInnerProduct.estimate(x), Atoms(capacity=F, target_l0=K), training)[0], heldout)[0]


@pytest.mark.parametrize("step", ["sparse", "dense"])
def test_a_trainer_trains_what_fit_does(step: Any, expected: float, tmp_path: Path) -> None:
    x, heldout = planted(24_000).split(20_000)
    trained = SAETrainer(settings(1504), sae(step=step), stream(x)).fit()
    trained.save_inference_model(tmp_path)
    atoms = load_atoms(tmp_path)
    r2, l0 = measured(atoms, heldout)
    assert expected > 0.4 and abs(r2 - expected) < 0.01 and abs(l0 / K - 1) < 0.1
    assert measured(trained.eval(), heldout) == pytest.approx((r2, l0), rel=1e-3), "as it stands, too"
    assert (atoms.aip.n, atoms.aip.source) == (1024, "first 1024 activations of training")
    assert torch.equal(atoms.aip.metric, AtomicInnerProduct.estimate(torch.cat(first(x, 4))).metric)
    plain = SAE.load_from_disk(tmp_path)
    assert type(plain) is JumpReLUSAE and torch.equal(plain(heldout), atoms(heldout))


def first(x: torch.Tensor, batches: int) -> list[torch.Tensor]:
    every = stream(x)
    return [next(every) for _ in range(batches)]


def test_nothing_is_learned_before_the_start() -> None:
    """The optimizer does not move, no atom dies of waiting, and the last batch is cut where enough are there."""
    x, one = planted(4000), sae(first_activations=2 * BATCH + 10)
    trainer = SAETrainer(settings(100), one, stream(x))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    every = stream(x)
    for number in range(2):
        output = trainer.step(next(every))
        assert float(output.loss.detach()) == 0 and not trainer.optimizer.state, number
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    trainer.step(next(every))
    assert one.aip is not None and one.aip.n == 2 * BATCH + 10 and not trainer.optimizer.state
    assert int(trainer.n_forward_passes_since_fired.max()) == 0
    start = one.W_dec.detach().clone()
    assert float(trainer.step(next(every)).loss.detach()) > 0 and trainer.optimizer.state
    assert not torch.equal(one.W_dec, start)


def test_logged_figures_are_of_activations_as_they_are() -> None:
    x, one = planted(4000), sae()
    one.begin(x, AtomicInnerProduct.estimate(x), torch.Generator().manual_seed(0))
    output = one.training_forward_pass(TrainStepInput(x[:64], {"l0": 0.1}, None, 0, True))
    assert torch.equal(output.sae_in, x[:64])
    inside = one.training_forward_pass(TrainStepInput(x[:64], {"l0": 0.1}, None, 0, False))
    assert output.sae_out.shape == inside.sae_out.shape and not torch.equal(inside.sae_in, x[:64])
    assert float((output.sae_out - x[:64]).norm() / x[:64].norm()) < 1


def test_several_at_once_are_each_alone() -> None:
    x = {"a": planted(4000), "b": planted(4000).flip(1) * 2}
    alone = {name: SAETrainer(settings(30), seeded(), stream(rows)).fit() for name, rows in x.items()}
    both = {name: seeded() for name in x}
    MultiSAETrainer(settings(30), both, {"a": "a", "b": "b"}, Batches(x, BATCH, seed=0)).fit()
    for name, one in both.items():
        expected, found = alone[name].finish(), one.finish()
        assert found.aip.n == 1024 and torch.equal(found.aip.metric, expected.aip.metric)
        assert torch.equal(found.W_dec, expected.W_dec) and torch.equal(found.threshold, expected.threshold)


def seeded(**options: Any) -> Any:
    torch.manual_seed(0)
    return sae(**options)


def test_a_start_is_the_seeds() -> None:
    """Of the configuration, whatever the global generator is."""
    x = planted(4000)
    found = []
    for seed, everywhere in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(everywhere)
        found.append(SAETrainer(settings(12), sae(seed=seed), stream(x)).fit().finish())
    assert torch.equal(found[0].W_dec, found[1].W_dec) and not torch.equal(found[0].W_dec, found[2].W_dec)


def test_a_training_too_short_is_no_dictionary(tmp_path: Path) -> None:
    short = SAETrainer(settings(3), sae(), stream(planted(4000))).fit()
    message = "training ended after 768 activations, but the first 1024 only tell metric and start: train on more, or"
    for ask in (short.finish, lambda: short.save_inference_model(tmp_path / "none")):
        with pytest.raises(ValueError, match=message):
            ask()
    assert not (tmp_path / "none").exists()


def test_rows_that_are_no_numbers_are_refused() -> None:
    x = planted(1024)
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match="x has 1 rows with NaN or infinite values"):
        SAETrainer(settings(20), sae(), stream(x)).fit()


def test_massive_rows_are_told(caplog: pytest.LogCaptureFixture) -> None:
    x = planted(2048)
    x[::100] *= 100
    with caplog.at_level("WARNING"):
        SAETrainer(settings(6), sae(first_activations=500), iter(x.split(BATCH))).fit()
    assert "5 of the first 500 activations of training have more than 10 times the median norm" in caplog.text


def test_a_dictionary_still_in_training_is_not_measured() -> None:
    x = planted(4000)
    trained = SAETrainer(settings(6), sae(), stream(x)).fit()
    with pytest.raises(ValueError, match="the dictionary is still in training"):
        evaluate(trained, x[:500])
    assert evaluate(trained.finish(), x[:500], x[500:1000], trained.aip).heldout is not None


# --- what sae-lens asks of every architecture -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "options", "plain"),
    [
        ("aip_tsae", {"encoder": "tied"}, "jumprelu"),
        ("aip_tsae", {"encoder": "free"}, "jumprelu"),
        ("aip_topk", {"start": "data"}, "topk"),
        ("aip_pursuit", {"norm": 0.5, "prune": True}, "aip_pursuit"),
    ],
)
def test_configurations_go_round(architecture: str, options: dict[str, Any], plain: str) -> None:
    config = config_of(architecture, 3, d_in=D, d_sae=F, seed=7, first_activations=99, **options)
    again = TrainingSAEConfig.from_dict(config.to_dict())
    assert type(again) is get_sae_training_class(architecture)[1] and again.to_dict() == config.to_dict()
    inference = config.get_inference_sae_cfg_dict()
    atoms = SAEConfig.from_dict(inference)
    assert type(atoms) is get_sae_class(architecture)[1]
    assert atoms.to_dict() == {**inference, "architecture": plain}, "as any tool of sae-lens reads it"
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("aip_topk", {"loss_norm": 2.0}, "loss_norm is 2.0, allowed is 0"),
        ("aip_topk", {"start": "zero"}, "start is 'zero', allowed are 'data' and 'random'"),
        ("aip_topk", {"noise": -1.0}, "noise is -1.0, allowed is 0 or more"),
        ("aip_topk", {"normalize_activations": "layer_norm"}, "'layer_norm', allowed for aip_topk is 'none'"),
        ("aip_pursuit", {"norm": -0.1}, "norm is -0.1, allowed is 0"),
        ("aip_pursuit", {"k": 9.0}, "k is 9, allowed is 1 to max_iterations=6"),
    ],
)
def test_settings_that_mean_nothing_are_refused(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(architecture, 3, d_in=D, d_sae=F, **options)


@pytest.mark.parametrize(
    ("architecture", "options", "least"), [("aip_topk", {}, 0.65), ("aip_pursuit", {"amortised_steps": 200}, 0.9)]
)
def test_a_trainer_trains_pursuits_too(
    architecture: Any, options: dict[str, Any], least: float, tmp_path: Path
) -> None:
    """As well as `fit` does; a pursuit meets its mean L0 on rows it has not seen, and explains far more of them."""
    x, heldout = planted(8_000, D // 2, F // 4, K // 2).split(6_000)
    recipe = Atoms(architecture=architecture, capacity=F // 4, target_l0=K // 2)
    training = Training(steps=600, batch_size=BATCH, lr=3e-3, device="cpu")
    expected, _ = measured(fit_one(x, AtomicInnerProduct.estimate(x), recipe, training)[0], heldout)
    one = sae(architecture, K // 2, d_in=D // 2, d_sae=F // 4, first_activations=2048, **options)
    trained = SAETrainer(replace(settings(608), lr=3e-3), one, stream(x)).fit()
    trained.save_inference_model(tmp_path)
    atoms = load_atoms(tmp_path)
    r2, l0 = measured(atoms, heldout)
    assert r2 > expected - 0.02 and r2 > least and abs(l0 / (K // 2) - 1) < 0.1
    assert atoms.aip.source == "first 2048 activations of training"
    assert measured(trained.eval(), heldout) == pytest.approx((r2, l0), rel=1e-2), "as it stands, too"
    plain = SAE.load_from_disk(tmp_path)  # which rounds the metric of a pursuit to float32
    assert float((plain(heldout) - atoms(heldout)).norm() / heldout.norm()) < 1e-3


def random_weights(one: Any) -> Any:
    for parameter in one.parameters():
        parameter.data = torch.rand_like(parameter)
    return one


@torch.no_grad()
def test_folding_the_norm_of_atoms() -> None:
    one = random_weights(sae())
    two = deepcopy(one)
    two.fold_W_dec_norm()
    x, norms = torch.randn(10, 4, D), one.W_dec.norm(dim=1)
    torch.testing.assert_close(two.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(two.b_enc, one.b_enc * norms)
    torch.testing.assert_close(two.threshold, one.threshold * norms)
    torch.testing.assert_close(two.encode(x), one.encode(x) * norms)
    torch.testing.assert_close(two.decode(two.encode(x)), one.decode(one.encode(x)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_saved_and_loaded_before_training(architecture: str, tmp_path: Path) -> None:
    """Weights as sae-lens drew them are a dictionary without a metric, for training, inference and plain sae-lens."""
    one, x = random_weights(sae(architecture)), torch.randn(8, D)
    one.save_model(tmp_path / "training")
    again, atoms = TrainingSAE.load_from_disk(tmp_path / "training"), SAE.load_from_disk(tmp_path / "training")
    assert type(again) is get_sae_training_class(architecture)[0] and type(atoms) is get_sae_class(architecture)[0]
    assert again.cfg.to_dict() == one.cfg.to_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    one.save_inference_model(tmp_path / "inference")
    others = [again, atoms, SAE.load_from_disk(tmp_path / "inference"), load_atoms(tmp_path / "inference")]
    for other in others[1:] if architecture == "aip_pursuit" else others:
        one = atoms if architecture == "aip_pursuit" else one  # whose encoder is no pursuit before it has a threshold
        torch.testing.assert_close(other.encode(x), one.encode(x))
        torch.testing.assert_close(other(x), one(x))
    assert load_atoms(tmp_path / "inference").aip.source == "none: Euclidean"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_what_is_saved_in_training_goes_on(architecture: str, tmp_path: Path) -> None:
    """Contiguous, with the exact metric; loading it twice takes nothing from the state that is loaded."""
    one, x = sae(architecture, dtype="float32"), planted(2000)
    one.begin(x, AtomicInnerProduct.estimate(x, source="here"), torch.Generator().manual_seed(0))
    state = one.state_dict()
    one.process_state_dict_for_saving(state)
    assert all(value.is_contiguous() for value in state.values())
    one.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(again, Learning) and again.aip is not None and one.aip is not None
    assert again.aip.source == "here" and torch.equal(again.aip.metric, one.aip.metric)
    assert torch.equal(again.encode(x), one.encode(x))
    with pytest.raises(ValueError, match="checkpoint from the middle of training"):
        SAE.load_from_disk(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        load_atoms(tmp_path)


# --- the runner -------------------------------------------------------------------------------------------------------


def texts(n: int = 400) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    return Dataset.from_dict({"tokens": torch.randint(3, 50, (n, 16), generator=generator).tolist()})


def runner(
    folder: Path, steps: int = 12, hook: str = HOOK, architecture: str = "aip_tsae", **options: Any
) -> LanguageModelSAERunnerConfig[Any]:
    more = {"amortised_steps": 4} if architecture == "aip_pursuit" else {}
    return LanguageModelSAERunnerConfig(
        sae=config_of(architecture, 2, d_in=16, d_sae=32, first_activations=300, **more),
        model_name="tiny",
        hook_name=hook,
        dataset_path="texts",
        is_dataset_tokenized=True,
        context_size=16,
        prepend_bos=False,
        training_tokens=steps * 128,
        train_batch_size_tokens=128,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        streaming=False,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        output_path=str(folder / "atoms"),
        checkpoint_path=str(folder / "checkpoints"),
        verbose=False,
        **options,
    )


def hooked() -> HookedSAETransformer:
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=210, act_fn="relu", seed=0
    )
    return HookedSAETransformer(config)


def bridge(tiny: str) -> SAETransformerBridge:
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    made = SAETransformerBridge.boot_transformers(
        "tiny", hf_model=model, tokenizer=AutoTokenizer.from_pretrained(tiny), device="cpu"
    )
    made.enable_compatibility_mode(no_processing=True)
    return made


@pytest.mark.parametrize(
    ("architecture", "kind", "hook"),
    [
        ("aip_tsae", "hooked", HOOK),
        ("aip_tsae", "bridge", HOOK),
        ("aip_tsae", "hooked", "blocks.1.attn.hook_z"),
        ("aip_topk", "hooked", "blocks.1.attn.hook_z"),
        ("aip_pursuit", "bridge", HOOK),
        ("aip_pursuit", "hooked", "blocks.1.attn.hook_z"),
    ],
)
def test_the_runner_leaves_atoms(architecture: str, kind: str, hook: str, tiny: str, tmp_path: Path) -> None:
    model: Any = hooked() if kind == "hooked" else bridge(tiny)
    run = LanguageModelSAETrainingRunner(runner(tmp_path, hook=hook, architecture=architecture), texts(), model)
    trained = run.run()
    atoms, x = load_atoms(tmp_path / "atoms"), run.activations_store.next_batch().squeeze(1)
    assert atoms.aip.n == 300 and atoms.aip.source == "first 300 activations of texts"
    assert atoms.cfg.metadata.hook_name == hook and atoms.cfg.metadata.model_from_pretrained_kwargs == {}
    assert float((atoms(x) - trained.eval()(x)).norm() / x.norm()) < 1e-3
    assert (tmp_path / "atoms" / "sparsity.safetensors").exists()
    torch.save(x, tmp_path / "x.pt")
    torch.save(atoms(x), tmp_path / "out.pt")
    script = (
        f"import sys, torch{', atom_lens' if architecture == 'aip_pursuit' else ''}; from sae_lens import SAE\n"
        f"sae = SAE.load_from_disk({str(tmp_path / 'atoms')!r})\n"
        f"x, out = torch.load({str(tmp_path / 'x.pt')!r}), torch.load({str(tmp_path / 'out.pt')!r})\n"
        f"assert type(sae).__name__ == {PLAIN[architecture]!r}, type(sae)\n"
        f"assert ('atom_lens' in sys.modules) is {architecture == 'aip_pursuit'}\n"
        "if sae.cfg.reshape_activations == 'hook_z': x, out = x.unflatten(-1, (2, 8)), out.unflatten(-1, (2, 8))\n"
        "torch.testing.assert_close(sae(x), out, rtol=1e-5, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("architecture", ["aip_tsae", "aip_pursuit"])
def test_the_runner_goes_on_from_a_checkpoint(architecture: str, tmp_path: Path) -> None:
    """With the metric and the start that it had; such a checkpoint is no dictionary."""
    config = runner(tmp_path, n_checkpoints=1, architecture=architecture)
    LanguageModelSAETrainingRunner(config, texts(), hooked()).run()
    (checkpoint,) = Path(str(config.checkpoint_path)).iterdir()
    with pytest.raises(ValueError, match="checkpoint from the middle of training"):
        SAE.load_from_disk(checkpoint)
    saved = TrainingSAE.load_from_disk(checkpoint)
    again = runner(tmp_path / "again", resume_from_checkpoint=str(checkpoint), architecture=architecture)
    resumed = LanguageModelSAETrainingRunner(again, texts(), hooked())
    assert isinstance(saved, Learning) and saved.aip is not None
    resumed.run()
    atoms = load_atoms(tmp_path / "again" / "atoms")
    assert torch.equal(atoms.aip.metric, saved.aip.metric) and atoms.aip.source == saved.aip.source
    assert not torch.equal(atoms.W_dec, saved.finish().W_dec), "it has gone on"


def test_the_command_line(tiny: str, tmp_path: Path) -> None:
    """sae-lens' own, in a process of its own: a local model by name, a local data set."""
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "gpt2")
    size: dict[str, Any] = {"vocab_size": 210, "n_positions": 64, "n_ctx": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "texts").mkdir()
    words = Dataset.from_dict({"text": ["Paris is a city in the capital of France Rome Oslo Lyon"] * 400})
    words.to_parquet(tmp_path / "texts" / "train.parquet")
    options = {
        "architecture": "aip_tsae",
        "d_in": 16,
        "d_sae": 32,
        "target_l0": 2.0,
        "first_activations": 300,
        "noise": 0.1,
        "model_name": "gpt2",
        "hook_name": HOOK,
        "dataset_path": "texts",
        "context_size": 16,
        "training_tokens": 1280,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "device": "cpu",
        "log_to_wandb": False,
        "output_path": "atoms",
    }
    command = [
        sys.executable,
        "-c",
        COMMAND,
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    atoms = load_atoms(tmp_path / "atoms")
    assert atoms.aip.n == 300 and atoms.cfg.metadata.training_architecture_details["noise"] == 0.1
