"""Edit what a model believes about Paris: see what fires, ablate it, swap it, steer with it, generate.

    python examples/03_causal_edit.py [--cities 6000] [--steps 400] [--atoms RUN_FOLDER]

Trains atoms on city names at layer 11 of the demo model (two minutes), or loads those of a run. Whether such edits do
what they say on hundreds of facts, and what they break, is what `atom-lens intervene` measures (docs/interventions.md).
Needs `pip install "atom-lens[demo]"`; the first run converts the model (a minute).
"""

import argparse

import torch

from atom_lens import fit, harvest, load_atoms, open_model, splice
from atom_lens.activations.prompts.cities import Cities
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.interventions.attribution import attribution, read

HOOK = "blocks.11.hook_resid_post"
TEMPLATE = "{} is a city in the country of"

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--cities", type=int, default=6000)
arguments.add_argument("--steps", type=int, default=400)
arguments.add_argument("--atoms", help="a run folder with atoms of this hook")
options = arguments.parse_args()

# The live model, the activations of its subjects, and atoms.
model = open_model("demo:gemma-3-270m")
prompts = Cities(template=TEMPLATE, limit=options.cities).read()
x = harvest("demo:gemma-3-270m", prompts, HOOK, "subject_last")[HOOK]
if options.atoms:
    atoms = load_atoms(options.atoms, hook=HOOK)
else:
    about = {"model_name": "demo:gemma-3-270m", "hook_name": HOOK, "prepend_bos": True}
    atoms, _ = fit(x, d_sae=1280, target_l0=8, pursuit={"norm": 0.5}, steps=options.steps, metadata=about)
atoms.to("cpu")  # where activations are read to; a splice brings them to the model

# What fires on Paris, and which other cities each of these atoms fires on most.
paris, tokyo = (Prompt.fill(TEMPLATE, name) for name in ("Paris", "Tokyo"))
seen = read(model, HOOK, [paris, tokyo], ["France", "Japan"])
codes = atoms.encode(seen.x)
on_cities = atoms.encode(x).detach()
push = attribution(atoms, seen)[0]
print(f"{int((codes[0] > 0).sum())} atoms fire on Paris; these push the answer France most:")
strongest = push.topk(5).indices.tolist()
for atom in strongest:
    others = [prompts[i].subject for i in on_cities[:, atom].topk(6).indices.tolist()]
    print(f"  atom {atom:4d}  {float(push[atom]):+.2f} nats of log-odds, fires most on {', '.join(map(str, others))}")

# The last token of the subject, counted in the tokens that the model reads (BOS first).
tokens = model.to_tokens(paris.text)
at = [i for i, token in enumerate(model.to_str_tokens(paris.text)) if "Paris" in token][-1]


def answers(label: str) -> None:
    """The three most probable next words."""
    with torch.no_grad():
        probable = model(tokens)[0, -1].softmax(-1).topk(3)
    words = (f"{model.to_string(t).strip()} {p:.0%}" for p, t in zip(probable.values, probable.indices, strict=True))
    print(f"  {label:40s} {', '.join(words)}")


print(f"\n{paris.text} ...")
answers("clean")
with splice(model, atoms) as s:
    answers("atoms in, no edit")
    s.ablate(strongest, positions=at)
    answers("five strongest atoms ablated")
    s.clear().ablate(positions=at)
    answers("all atoms ablated")
    for dose in (0.5, 1.0, 1.5):
        s.clear().add(None, dose * (codes[1] - codes[0]), positions=at)
        answers(f"{dose:g} of the way to Tokyo's code")
    s.clear().patch(seen.x[1], positions=at)
    answers("Tokyo's whole activation (the ceiling)")

    print("\nGenerating from 'Paris is'")
    text = model.to_tokens("Paris is")
    for label, edit in (
        ("clean", s.clear),
        ("Tokyo's code for Paris's, wherever it is", lambda: s.clear().exchange(codes[0], codes[1])),
    ):
        edit()
        said = model.generate(text, max_new_tokens=14, do_sample=False, verbose=False)
        print(f"  {label:40s} {model.to_string(said[0, 1:])!r}")
