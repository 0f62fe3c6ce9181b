"""Evidence: faithfulness, stability, nulls, and the report that puts them side by side. Uses torch only."""

from atom_lens.evidence.faithfulness import faithfulness
from atom_lens.evidence.measure import measure
from atom_lens.evidence.report import evaluate, reading, table
from atom_lens.evidence.stability import Stability, stability

__all__ = ["Stability", "evaluate", "faithfulness", "measure", "reading", "stability", "table"]
