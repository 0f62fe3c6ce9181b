"""Evidence: what figures of a dictionary are worth, on data it never saw and beside dictionaries that know nothing."""

from atom_lens.evidence.certify import certify
from atom_lens.evidence.faithfulness import faithfulness
from atom_lens.evidence.identity import identity, match
from atom_lens.evidence.measure import measure, observe
from atom_lens.evidence.reading import certificates_text, reading, table
from atom_lens.evidence.report import evaluate
from atom_lens.evidence.stability import Stability, stability

__all__ = [
    "Stability",
    "certificates_text",
    "certify",
    "evaluate",
    "faithfulness",
    "identity",
    "match",
    "measure",
    "observe",
    "reading",
    "stability",
    "table",
]
