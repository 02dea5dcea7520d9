"""FedRolex: HeteroFL whose narrow models roll over the shared one, so that every channel is trained in turn.

Source: Alam, Liu, Yan, Zhang 2022, "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction", arXiv
2212.01548 (NeurIPS 2022): in round t = 0, 1, .. the channels held of each layer of n begin with number t mod n and wrap around. So
the shared model may be larger than what any client can hold.

Ours, as in HeteroFL: the residual stream's width stays. Attention rolls by whole heads, the feed-forward layer by channels.
"""

from __future__ import annotations

from distfl.fleet import Client
from distfl.messages import Assignment, Region
from distfl.methods.base import Detail, Workload
from distfl.methods.heterofl import HeteroFl
from distfl.recipes import Recipe
from distfl.units import TensorSpec, Window


class FedRolex(HeteroFl):
    """Rolling widths by budget."""

    source = "arXiv 2212.01548"
    someone_holds_all = False

    def assignment(
        self, round: int, client: Client, window: Window, recipe: Recipe, weight: float, workload: Workload, detail: Detail
    ) -> Assignment:
        """``first_query``, ``first_hidden``: where those that the client holds begin."""
        spec = workload.costs.spec
        first = {
            "first_query": (round - 1) % spec.heads * (spec.width // spec.heads) if detail["queries"] < spec.width else 0,
            "first_hidden": (round - 1) % spec.feedforward if detail["hidden"] < spec.feedforward else 0,
        }
        return super().assignment(round, client, window, recipe, weight, workload, {**detail, **first})

    def part(self, tensor: TensorSpec, detail: Detail) -> Region:
        held = super().part(tensor, detail)
        if held is None or "first_query" not in detail:
            return held
        layer = tensor.name.rpartition(".")[0].rpartition(".")[2]
        first = detail["first_query" if layer in ("qkv", "proj") else "first_hidden"]
        rows, columns = held if isinstance(held, tuple) else (held, None)
        if layer in ("qkv", "fc1"):  # outputs; queries, keys and values one under another
            channels = tensor.shape[0] // (3 if layer == "qkv" else 1)
            rows = rows // channels * channels + (rows + first) % channels
        elif columns is not None:  # inputs; the bias belongs to the residual stream
            columns = (columns + first) % tensor.shape[1]
        return rows if columns is None else (rows, columns)


METHOD = FedRolex
