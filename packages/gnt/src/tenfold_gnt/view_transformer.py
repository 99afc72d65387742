"""The view transformer (section 2.4): a sample point's token attends to the source views by subtraction attention.

The released form is, per point with token t and view features x_v,

    k = W_k x,  v = W_v k,  q = W_q t,  ρ = P(ray_diff),  a = softmax_v(A(k - q + ρ)),  y = W_o Σ_v a_v ⊙ (v_v + ρ_v)

where P and A are two-layer networks with D/8 hidden units. Only the D/8 inputs of A's ReLU are ever needed of keys and
queries, so their projections are multiplied into A's and P's first (section 14): logits cost D/8 instead of D columns a
view, and the two value projections become one. Same function, same gradients, fewer passes over memory.
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.dropout import dropout
from tenfold_gnt.seen_views import SeenViews

BLOCK_NORM_EPS = 1e-6
DROPOUT = 0.1
MASKED = -1e9


class FeedForward(nn.Module):
    """Linear(D, 4D), ReLU, dropout, Linear(4D, D), dropout."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The transformed tokens."""
        hidden = dropout(F.relu(self.expand(x), inplace=True), self.dropout, self.training)
        return dropout(self.contract(hidden), self.dropout, self.training)


class Attended(NamedTuple):
    """Attended values, and the attention over views averaged over channels where it was asked for."""

    values: Float[Tensor, "*points width"]
    view_weights: Float[Tensor, "*points views"] | None


def masked_softmax(
    logits: Float[Tensor, "*points views width"], mask: Float[Tensor, "*points views 1"] | None
) -> Float[Tensor, "*points views width"]:
    """Softmax over views, per channel; masked views get 0, and a point without any view weighs all alike."""
    logits = logits if logits.dtype == torch.float64 else logits.float()  # also under reduced precision
    if mask is not None:
        logits = logits.masked_fill(mask == 0, MASKED)
    return logits.softmax(-2)


class SubtractionAttention(nn.Module):
    """Attention over views with a weight for every channel.

    Args:
        width: D, a multiple of 8.
        dropout: on the weights and on the output.
        double_projection: project the values from the keys, as released networks do, instead of from the features.

    """

    def __init__(self, width: int, dropout: float = DROPOUT, *, double_projection: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.position = nn.Sequential(nn.Linear(4, width // 8), nn.ReLU(), nn.Linear(width // 8, width))
        self.weight = nn.Sequential(nn.Linear(width, width // 8), nn.ReLU(), nn.Linear(width // 8, width))
        self.out = nn.Linear(width, width)
        self.dropout, self.double_projection = dropout, double_projection

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The products of weights that the attention needs.

        Returns:
            From the features and from the position units (a constant last) to [values, logit units], and from the
            query to logit units.

        """
        first, last = cast(nn.Linear, self.weight[0]), cast(nn.Linear, self.position[2])
        value = self.value.weight @ self.key.weight if self.double_projection else self.value.weight
        from_features = torch.cat([value, first.weight @ self.key.weight])
        from_position = torch.cat([last.weight, first.weight @ last.weight])
        constant = torch.cat([last.bias, first.weight @ last.bias + first.bias])
        return from_features, torch.cat([from_position, constant[:, None]], 1), first.weight @ self.query.weight

    def position_units(self, ray_diff: Float[Tensor, "*points views 4"]) -> Float[Tensor, "*points views units"]:
        """The hidden units of P and, as relu(0 · r + 1), a constant column to carry biases through the next product."""
        first = cast(nn.Linear, self.position[0])
        weight = torch.cat([first.weight, first.weight.new_zeros(1, 4)])
        return F.relu(F.linear(ray_diff, weight, torch.cat([first.bias, first.bias.new_ones(1)])), inplace=True)

    def forward(
        self,
        tokens: Float[Tensor, "*points width"],
        features: Float[Tensor, "*points views width"],
        ray_diff: Float[Tensor, "*points views 4"],
        mask: Float[Tensor, "*points views 1"] | None = None,
        *,
        return_weights: bool = False,
        seen: SeenViews | None = None,
    ) -> Attended:
        """Attend from every point to its views.

        Args:
            tokens: normalised tokens.
            features: of the views, not normalised.
            ray_diff: relative directions.
            mask: 0 for views that do not see the point; a point that no view sees weighs all views alike.
            return_weights: also give the weights, averaged over channels.
            seen: `seen_views` of features, directions and mask, which are not read then.

        """
        from_features, from_position, from_query = self.folded()
        queries = F.linear(tokens, from_query)
        if seen is None:
            values, keys = self._values_and_keys(features, ray_diff, from_features, from_position)
            logits = self._logits(F.relu(keys - queries[..., None, :], inplace=True), mask)
            summed, weights = self._weigh(logits, values, return_weights)
        else:
            values, keys = self._values_and_keys(seen.features, seen.ray_diff, from_features, from_position)
            hidden = F.relu(keys - queries.flatten(0, -2).index_select(0, seen.points), inplace=True)
            logits = cast(nn.Linear, self.weight[2])(hidden)
            summed, weights = self._weigh_seen(logits, values, seen, features.shape[:-1], return_weights)
        attended = dropout(self.out(summed.to(tokens.dtype)), self.dropout, self.training)
        return Attended(attended, weights)

    def _values_and_keys(
        self, features: Tensor, ray_diff: Tensor, from_features: Tensor, from_position: Tensor
    ) -> tuple[Tensor, ...]:
        """Values, and the keys' share of A's hidden units."""
        mixed = features.flatten(0, -2) @ from_features.T
        mixed.addmm_(self.position_units(ray_diff).flatten(0, -2).to(mixed.dtype), from_position.T.to(mixed.dtype))
        width = features.shape[-1]
        return mixed.view(*features.shape[:-1], mixed.shape[-1]).split([width, mixed.shape[-1] - width], -1)

    def _weigh(
        self,
        logits: Float[Tensor, "*points views width"],
        values: Float[Tensor, "*points views width"],
        return_weights: bool,
    ) -> tuple[Float[Tensor, "*points width"], Float[Tensor, "*points views"] | None]:
        """The values' mean under the softmax over the views, and that softmax averaged over channels."""
        # The softmax needs single precision also under reduced precision.
        attention = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-2)
        summed = (dropout(attention, self.dropout, self.training) * values).sum(-2)
        return summed, attention.mean(-1) if return_weights else None

    def _weigh_seen(
        self, logits: Tensor, values: Tensor, seen: SeenViews, shape: torch.Size, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`_weigh` of packed pairs, group after group; the results of all points, of `shape` (*points, views)."""
        of_groups, values_of_groups = seen.split(logits), seen.split(values)
        if seen.blind:  # all views alike
            of_groups[0] = torch.zeros_like(of_groups[0])
        summed, weights = [], []
        for group in zip(of_groups, values_of_groups, strict=True):
            mean, share = self._weigh(*group, return_weights)
            summed.append(mean)
            if share is not None:
                weights.append(share.flatten())
        means = torch.cat(summed).index_select(0, seen.back).view(*shape[:-1], -1)
        if not return_weights:
            return means, None
        return means, means.new_zeros(shape.numel()).index_copy(0, seen.pairs, torch.cat(weights)).view(shape)

    def _logits(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Last layer of A with the mask as one more input column of weight 1: no pass over [points, views, D]."""
        last = cast(nn.Linear, self.weight[2])
        if mask is None:
            return last(hidden)
        # Where no view is valid all hidden units are 0, so that all logits of a channel are equal, as they must be.
        hidden = hidden * mask.amax(-2, keepdim=True).to(hidden.dtype)
        blocked = (mask.to(hidden.dtype) - 1) * min(-MASKED, torch.finfo(hidden.dtype).max / 4)
        weight = torch.cat([last.weight, last.weight.new_ones(len(last.weight), 1)], 1)
        return F.linear(torch.cat([hidden, blocked], -1), weight, last.bias)


class DotProductAttention(nn.Module):
    """The ablation "dot": multi-head scaled dot products over views instead of subtraction.

    Relative directions enter keys and values as ρ = P(ray_diff), as they do in subtraction attention.
    """

    def __init__(self, width: int, dropout: float = DROPOUT, heads: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.position = nn.Sequential(nn.Linear(4, width // 8), nn.ReLU(), nn.Linear(width // 8, width))
        self.out = nn.Linear(width, width)
        self.dropout, self.heads = dropout, heads

    def forward(
        self,
        tokens: Float[Tensor, "*points width"],
        features: Float[Tensor, "*points views width"],
        ray_diff: Float[Tensor, "*points views 4"],
        mask: Float[Tensor, "*points views 1"] | None = None,
        *,
        return_weights: bool = False,
    ) -> Attended:
        """Attend from every point to its views; arguments as for `SubtractionAttention`."""
        position = self.position(ray_diff)
        query = self.query(tokens).unflatten(-1, (self.heads, -1))
        key, value = (
            (part + position).unflatten(-1, (self.heads, -1)) for part in (self.key(features), self.value(features))
        )
        logits = torch.einsum("...hd,...vhd->...vh", query, key) / query.shape[-1] ** 0.5
        attention = masked_softmax(logits, mask)
        dropped = dropout(attention, self.dropout, self.training)
        summed = torch.einsum("...vh,...vhd->...hd", dropped, value.to(dropped.dtype)).flatten(-2)
        attended = dropout(self.out(summed.to(tokens.dtype)), self.dropout, self.training)
        return Attended(attended, attention.mean(-1) if return_weights else None)


class ViewBlock(nn.Module):
    """Pre-norm block: attention over the views, then a feed-forward network. Only the tokens are normalised."""

    def __init__(self, width: int, attention: nn.Module, dropout: float = DROPOUT, hidden: int | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS)
        self.feed_norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS)
        self.feed = FeedForward(width, hidden or 4 * width, dropout)
        self.attention = attention

    def forward(
        self,
        tokens: Float[Tensor, "*points width"],
        features: Float[Tensor, "*points views width"],
        ray_diff: Float[Tensor, "*points views 4"],
        mask: Float[Tensor, "*points views 1"] | None = None,
        *,
        return_weights: bool = False,
        seen: SeenViews | None = None,
    ) -> Attended:
        """The updated tokens, and the view weights where asked for; `seen` as `SubtractionAttention` takes it."""
        packed = {} if seen is None else {"seen": seen}
        values, weights = self.attention(
            self.attention_norm(tokens), features, ray_diff, mask, return_weights=return_weights, **packed
        )
        tokens = tokens + values
        return Attended(tokens + self.feed(self.feed_norm(tokens)), weights)
