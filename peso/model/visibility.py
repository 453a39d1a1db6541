"""Who may attend to whom when several prompts share one row of tokens.

Knows numbered tokens; knows nothing of items, users or losses. A row holds a *root* (the fixed opening
tokens of the layout, computed once), then *sequences*; a sequence is a *trunk* with *branches* that leave it.

    root ── h1 h2 h3 h4 h5           trunk of sequence 1 (branch 0)
              │     └── b b b b      branch 2 of sequence 1, limit 3: sees the root, h1…h4 and itself
              └── b b b b            branch 1 of sequence 1, limit 1: sees the root, h1 h2 and itself
     └───── h1 h2 h3                 trunk of sequence 2: sees the root and itself, nothing of sequence 1
"""

from __future__ import annotations

from torch import Tensor

ROOT = 0  # sequence number of the shared opening
PADDING = -1  # sequence number of what only fills the row up
TRUNK = 0  # branch number of a trunk


def visibility(sequence: Tensor, branch: Tensor, order: Tensor, limit: Tensor) -> Tensor:
    """The attention mask of packed rows.

    Query q sees key k where k is in the root and q in a sequence, or both are of the same sequence and k
    either lies in the trunk at ``order_k <= limit_q`` or in q's own branch at ``order_k <= order_q``.
    Padding sees padding, since attention over nothing is not a number.

    Args:
        sequence: int (rows, length): 0 the root, 1… the sequences, -1 padding.
        branch: int (rows, length): 0 in root, trunk and padding, 1… in the branches of a sequence.
        order: int (rows, length): place within root, trunk or branch.
        limit: int (rows, length): the last place of its trunk that a token sees; a trunk token's own place,
            -1 for a branch that leaves the root itself.

    Returns:
        bool (rows, 1, length, length), query before key, as :meth:`GenerativeModel.hidden` takes it.
    """
    of_q = [x.unsqueeze(2) for x in (sequence, branch, order, limit)]  # (rows, length, 1)
    of_k = [x.unsqueeze(1) for x in (sequence, branch, order)]  # (rows, 1, length)
    sequence_q, branch_q, order_q, limit_q = of_q
    sequence_k, branch_k, order_k = of_k
    in_trunk = (branch_k == TRUNK) & (order_k <= limit_q)
    in_branch = (branch_k == branch_q) & (order_k <= order_q)
    in_root = (sequence_k == ROOT) & (sequence_q > ROOT)
    return (in_root | ((sequence_q == sequence_k) & (in_trunk | in_branch))).unsqueeze(1)
