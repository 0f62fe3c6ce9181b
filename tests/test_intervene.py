"""Facts, attribution and the causal evaluation, against plain transformers and a dictionary that is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from support.talking import study
from transformers import AutoModelForCausalLM, AutoTokenizer

from atom_lens import Prompt, splice
from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import open_backend
from atom_lens.activations.models import find_model
from atom_lens.cli import main
from atom_lens.evidence.bootstrap import mean_interval, ratio_interval
from atom_lens.interventions.attribution import attribution, read
from atom_lens.interventions.causal import Evaluation, known, pair, swaps, third
from atom_lens.interventions.facts import ask, divergence

HOOK = "blocks.1.hook_resid_post"
SUBJECTS = ["Paris", "New York", "San Francisco", "Rome", "Oslo", "Lyon"]
ANSWERS = ["France", "Italy", "the capital", "France", "of Italy", "in"]
FACTS = [Prompt.fill("{} is a city in the", s, a) for s, a in zip(SUBJECTS, ANSWERS, strict=True)]


@pytest.fixture(scope="module", params=["transformer_lens", "nnsight"])
def backend(request: pytest.FixtureRequest, tiny: str) -> Backend:
    return open_backend(find_model(tiny), request.param, torch.float32, "cpu")


def exact_sae(d: int = 16) -> SAE[Any]:
    """±e_i as atoms: every activation has an exact code of d atoms."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, metadata=SAEMetadata(hook_name=HOOK)))
    sae.W_dec.data = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_enc.data.zero_()
    sae.b_dec.data.fill_(0.001)
    return sae


def reference_logprobs(tiny: str, text: str, answer: str, change: Any = None) -> tuple[float, bool]:
    """One prompt at a time, no padding, plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    begin, end = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, answer))
    if change is not None:
        model.model.layers[1].register_forward_hook(lambda m, i, o: change(o))
    with torch.no_grad():
        logprobs = model(torch.tensor([[1, *begin, *end]])).logits[0].log_softmax(-1)[len(begin) :]
    pairs = list(zip(logprobs, end, strict=False))
    return sum(float(lp[token]) for lp, token in pairs), all(int(lp.argmax()) == token for lp, token in pairs)


def test_answers_are_scored_as_transformers_scores_them(tiny: str, backend: Backend) -> None:
    """Whole answers of several tokens, padded batches, clean and under an edit at the subject."""
    sae = exact_sae()
    edits = {
        "clean": None,
        "ablated": lambda batch: splice(backend, sae).ablate(positions=batch.subject),
    }
    found = ask(backend, FACTS, [(p.answer, "Oslo") for p in FACTS], edits)
    last = {"New York": 2, "San Francisco": 2}

    for row, prompt in enumerate(FACTS):

        def blank(x: torch.Tensor, prompt: Prompt = prompt) -> torch.Tensor:
            x = x.clone()
            x[0, last.get(str(prompt.subject), 1)] = 0.001
            return x

        for column, answer in enumerate((str(prompt.answer), "Oslo")):
            for name, change in (("clean", None), ("ablated", blank)):
                logprob, greedy = reference_logprobs(tiny, prompt.text, answer, change)
                assert float(found[name].logprob[row, column]) == pytest.approx(logprob, abs=1e-4)
                assert bool(found[name].greedy[row, column]) == greedy
    assert float((found["clean"].logprob - found["ablated"].logprob).abs().min()) > 0


def test_asking_more_than_the_context_is_refused(backend: Backend) -> None:
    """64 tokens, of which BOS is one; the last token of an answer is not read."""
    facts = [Prompt("Rome" + " is" * n, "Rome", answer="Italy") for n in (62, 63)]
    ask(backend, facts[:1], [["Italy"]], {"clean": None})
    with pytest.raises(ValueError, match="has 65 tokens with its answer, the model reads 64"):
        ask(backend, facts[1:], [["Italy"]], {"clean": None})
    with pytest.raises(ValueError, match="answer 1 of 'Rome is.*' is ' ', text is needed"):
        ask(backend, facts[:1], [["Italy", " "]], {"clean": None})
    edits = {"ablated": lambda batch: splice(backend, exact_sae()).ablate(positions=batch.subject)}
    longest = [Prompt("Rome" + " is" * 99, "Rome")]
    cut = divergence(backend, longest, edits)["ablated"]
    assert torch.equal(cut, divergence(backend, longest, edits, max_tokens=64)["ablated"]) and cut > 0


def test_known_are_the_greedy_answers(tiny: str, backend: Backend) -> None:
    expected = [i for i, p in enumerate(FACTS) if reference_logprobs(tiny, p.text, str(p.answer))[1]]
    assert known(backend, FACTS) == expected


def test_divergence(tiny: str, backend: Backend) -> None:
    """KL of the next token, by its definition on the logits of both models."""
    sae, texts = exact_sae(), [Prompt("Rome is a city"), Prompt("the capital of France is in Italy")]
    found = divergence(
        backend,
        texts,
        {"off": lambda batch: splice(backend, sae).ablate(), "same": lambda b: splice(backend, sae)},
        "all",
    )
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for row, prompt in enumerate(texts):
        ids = torch.tensor([[1, *tokenizer(prompt.text, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            p = model(ids).logits[0, -1].double().softmax(-1)
            handle = model.model.layers[1].register_forward_hook(lambda m, i, o: torch.full_like(o, 0.001))
            q = model(ids).logits[0, -1].double().softmax(-1)
            handle.remove()
        expected = float((p * (p / q).log()).sum())
        assert float(found["off"][row]) == pytest.approx(expected, rel=1e-3, abs=1e-6) and expected > 0
    assert float(found["same"].abs().max()) < 1e-6


def test_attribution_is_the_derivative(backend: Backend) -> None:
    """Activation times gradient: against a small scaling of each atom in the spliced model."""
    sae = exact_sae()
    with torch.no_grad():  # as many notebooks begin
        seen = read(backend, HOOK, FACTS, [str(p.answer) for p in FACTS])
        found = attribution(sae, seen)
    step = 0.02

    def log_odds(factor: torch.Tensor) -> torch.Tensor:
        edits = {"scaled": lambda b: splice(backend, sae).scale(None, factor, positions=b.subject)}
        logp = ask(backend, FACTS, [(p.answer,) for p in FACTS], edits)["scaled"].logprob[:, 0].double()
        return logp - torch.log1p(-logp.exp())

    for atom in (int(found.abs().sum(0).argmax()), 3, 20):
        factor = torch.ones(32)
        factor[atom] += step
        up = log_odds(factor)
        factor[atom] -= 2 * step
        slope = (up - log_odds(factor)) / (2 * step)
        torch.testing.assert_close(found[:, atom].double(), slope, rtol=0.02, atol=2e-4)
    assert float(found.abs().max()) > 1e-3


def test_an_exact_dictionary_reaches_the_ceiling(backend: Backend) -> None:
    """Where codes are exact, swapping codes is swapping activations, and what is left out changes nothing."""
    sae = exact_sae()
    pairs = swaps(backend, HOOK, FACTS, torch.Generator().manual_seed(0))
    assert all(own != other for own, other in pairs.answers)
    evaluation = Evaluation(backend, HOOK, sae, pairs)
    found, doses = evaluation.swap([0.5, 1.0])
    patch = found["patch"].logprob
    for name, like in (("swap", "patch"), ("replace", "patch"), ("rest", "none")):
        torch.testing.assert_close(found[name].logprob, found[like].logprob, rtol=0, atol=1e-4)
    torch.testing.assert_close(doses[1.0].logprob, patch, rtol=0, atol=1e-4)
    nulls = evaluation.null_doses([0.0, 1.0])
    for dose, like in ((0.0, "none"), (1.0, "other")):
        torch.testing.assert_close(nulls[dose].logprob, found[like].logprob, rtol=0, atol=1e-4)
    assert float((patch - found["none"].logprob).abs().max()) > 1e-3
    assert float((found["random"].logprob - patch).abs().max()) > 1e-3
    other = evaluation.other_like(evaluation.target_codes - evaluation.codes)
    towards = pairs.seen.x[third(pairs)] - pairs.seen.x
    cosine = torch.cosine_similarity(evaluation.decoded(other), towards)
    torch.testing.assert_close(cosine, torch.ones(len(cosine)), rtol=0, atol=1e-4)
    _, ablated = evaluation.ablate([1, 16])
    everything = (ablated[rank, 16].logprob for rank in ("attribution", "activation"))
    torch.testing.assert_close(*everything, rtol=0, atol=1e-4)
    others = evaluation.same_subject(["the capital of {} is"], 2)
    torch.testing.assert_close(others["swap"], others["patch"], rtol=0, atol=1e-5)
    installed = evaluation.spared(FACTS, 2)
    assert set(installed) == {"exchange", "ablate", "steer"} and all(len(kl) == 6 for kl in installed.values())


def test_the_null_has_the_same_norm_and_number(backend: Backend) -> None:
    pairs = swaps(backend, HOOK, FACTS, torch.Generator().manual_seed(0))
    evaluation = Evaluation(backend, HOOK, exact_sae(), pairs)
    change = evaluation.target_codes - evaluation.codes
    random = evaluation.random_like(change)
    assert torch.equal((random != 0).sum(1), (change != 0).sum(1))
    torch.testing.assert_close(evaluation.decoded(random).norm(dim=1), evaluation.decoded(change).norm(dim=1))
    strongest = evaluation.strongest(evaluation.codes, 3)
    assert torch.equal(strongest.sum(1), torch.full((6,), 3.0))
    for row in range(6):
        assert set(strongest[row].nonzero()[:, 0].tolist()) == set(evaluation.codes[row].topk(3).indices.tolist())


def test_intervals() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 2
    found = mean_interval(values)
    low, high = found["interval"]
    assert found["mean"] == pytest.approx(float(values.mean()))
    assert low == pytest.approx(float(values.mean() - 1.96 * values.std() / 20), abs=0.03)
    assert high == pytest.approx(float(values.mean() + 1.96 * values.std() / 20), abs=0.03)
    ratio = ratio_interval(values, 2 * values)
    assert ratio is not None and ratio["mean"] == pytest.approx(0.5) and ratio["interval"] == pytest.approx([0.5, 0.5])
    assert ratio_interval(values, torch.zeros(400)) is None
    rare = torch.zeros(40)
    rare[:2] = 1
    assert ratio_interval(rare / 2, rare) is None, "a ratio to what may be zero says nothing"


def test_pairs_need_two_answers() -> None:
    with pytest.raises(ValueError, match="the 2 facts have 1 different answers, a swap needs at least 2"):
        pair([Prompt("Rome", "Rome", answer="Italy"), Prompt("Oslo", "Oslo", answer="Italy")], torch.Generator())
    guineas = [Prompt("Conakry", "Conakry", answer="Guinea"), Prompt("Bissau", "Bissau", answer="Guinea-Bissau")]
    with pytest.raises(ValueError, match="answer 'Guinea' starts every other answer or is started by it"):
        pair(guineas, torch.Generator())


def test_the_study(talking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = study(talking, tmp_path)
    assert main(["intervene", str(recipe), "--out", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "ceiling: whole activation of B" in printed and "floor: no edit" in printed
    folder = tmp_path / "runs" / "causal"
    found = json.loads((folder / "intervene.json").read_text())
    assert found["n_facts"] >= 20 and found["hook"] in found["scan"]
    assert [cell["name"] for cell in found["cells"]] == ["tsae_tied-4", "topk-4"]
    for cell in found["cells"]:
        assert cell["swap"]["none"]["kept"]["mean"] == 1 and cell["swap"]["none"]["flips"]["mean"] == 0
        assert cell["swap"]["patch"]["log_odds"]["mean"] > cell["swap"]["random"]["log_odds"]["mean"]
        assert set(cell["train"]) == {"none", "patch", "swap", "replace"}
        half, whole = cell["doses"]
        assert half["dose"] == 0.5 and half["log_odds"] != whole["log_odds"] and half["null"] != whole["null"]
        assert whole["of_ceiling"] == cell["of_ceiling"]["swap"]
        for key in ("flips", "kept", "log_odds"):
            assert (whole[key], whole["null"][key]) == (cell["swap"]["swap"][key], cell["swap"]["other"][key])
        ranks = ("attribution", "activation", "random")
        assert [(one["rank"], one["k"]) for one in cell["ablate"]] == [(r, k) for r in ranks for k in (1, 2)]
        for figures in cell["kl"].values():
            assert all(f["mean"] >= 0 and f["interval"][0] <= f["mean"] <= f["interval"][1] for f in figures.values())
    assert next(folder.glob("*.png")).stat().st_size > 10_000
    stamp = (folder / "cells" / "topk-4.json").stat().st_mtime_ns
    (folder / "cells" / "tsae_tied-4.json").unlink()
    assert main(["intervene", str(recipe), "--quiet", "--out", str(tmp_path / "runs")]) == 0
    again = json.loads((folder / "intervene.json").read_text())
    assert (folder / "cells" / "topk-4.json").stat().st_mtime_ns == stamp, "what was measured is kept"
    for part in (found, again):
        for cell in part["cells"]:
            cell.pop("seconds")
    assert again == found, "the same recipe and seed gives the same figures"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("intervene.kinds=[neurons]", "intervene.kinds has 'neurons', allowed are kinds that are trained"),
        ("intervene.other_templates=[none]", "intervene.other_templates has 'none', allowed are texts with one {}"),
        ("intervene.facts=1", "key intervene.facts is 1, allowed is greater than or equal to 10"),
        ("intervene.l0=[0]", "key intervene.l0.0 is 0, allowed is greater than 0"),
        ("positions=span", "positions is 'span', intervene allows subject_last and last"),
        ("atoms=null", "key atoms is missing in recipe 'causal', intervene needs it"),
        ("prompts={source: python_docs, limit: 30}", "lack a subject or an answer, intervene needs both"),
        ("hooks=[blocks.9.hook_resid_post]", "asks for layer 9, the model has layers 0 to 2"),
    ],
)
def test_bad_recipes(
    talking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    recipe = study(talking, tmp_path)
    capsys.readouterr()  # what loading the model printed, where this test is the first to ask for it
    assert main(["intervene", str(recipe), override, "--quiet", "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    error = error[error.index("atom-lens intervene: ") :]  # the bar of a model that was loaded may come before
    assert message in error and error.count("\n") == 1


def test_a_model_that_knows_nothing(talking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = study(talking, tmp_path)
    facts = tmp_path / "facts.jsonl"
    rows = [json.loads(line) | {"answer": "Oslo Oslo Oslo"} for line in facts.read_text().splitlines()]
    facts.write_text("\n".join(map(json.dumps, rows)))
    assert main(["intervene", str(recipe), "--quiet", "--out", str(tmp_path / "runs")]) == 2
    assert "answers, intervene needs at least 10" in capsys.readouterr().err
