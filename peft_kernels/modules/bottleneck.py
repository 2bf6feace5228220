"""A bottleneck adapter as a module, and the adapters that one block has: y = r + g s (drop(f(n(x) A^T + a)) B^T + b).

x [..., K] is what the adapter reads, r [..., N] what it adds to: the block's input and output in the parallel form (He
et al. 2022, arXiv:2110.04366), both the block's output in the serial one (Houlsby et al. 2019, arXiv:1902.00751).
A = down_weight [E, K], a = down_bias [E], B = up_weight [N, E], b = up_bias [N]. The formula is the op's; what is drawn
at random in training (the dropout's seed, the samples that stochastic depth leaves out) is drawn here, from torch's
generator.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_kernels.ops import bottleneck_adapter, new_seed

INITS = ("mam", "lora", "bert", "houlsby")
_DEVIATION = {"bert": 0.02, "houlsby": 0.01}


class BottleneckAdapter(nn.Module):
    """One adapter: its parameters, and one call of `peft_kernels.bottleneck_adapter`.

    Args:
        in_features, r, out_features: K, E and N; N is K if it is not given.
        activation, norm, dropout_p, dropout_on: as in the op. Dropout is for training only.
        scaling: a number; "learned", one number that is trained; "channel", one for each of the N features. The
            trained ones start at 1.
        gate: whether each row has a gate g = sigmoid(x w + c) with w [K], which starts at 1/2.
        drop_path: the probability with which a sample (an entry of x's first dimension) goes without the adapter in
            training; for the others g is divided by 1 - drop_path (stochastic depth: Huang et al., arXiv:1603.09382).
        init: "mam" or "lora", A uniform as in nn.Linear and B = 0, so that the start is y = r bit for bit; "bert", both
            normal with deviation 0.02; "houlsby", both normal with deviation 0.01, truncated at two deviations. Biases
            start at 0.
        dtype: of the parameters.

    Example:
        >>> adapter = BottleneckAdapter(768, r=48, activation="gelu")
        >>> y = adapter(x)  # serial
        >>> y = adapter(x, ffn(x))  # parallel
    """

    def __init__(
        self, in_features: int, r: int, out_features: int | None = None, *, activation: str = "relu",
        scaling: float | str = 1.0, gate: bool = False, norm: str = "none", dropout_p: float = 0.0,
        dropout_on: str = "bottleneck", drop_path: float = 0.0, init: str = "mam", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if isinstance(scaling, str) and scaling not in ("learned", "channel"):
            raise ValueError(f"BottleneckAdapter: scaling must be a number, 'learned' or 'channel', got {scaling!r}")
        out_features = in_features if out_features is None else out_features
        self.activation, self.norm = activation, norm
        self.dropout_p, self.dropout_on, self.drop_path = dropout_p, dropout_on, drop_path
        self.scaling = 1.0 if isinstance(scaling, str) else float(scaling)

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.down_weight, self.down_bias = parameter(r, in_features), parameter(r)
        self.up_weight, self.up_bias = parameter(out_features, r), parameter(out_features)
        learned = {"learned": 1, "channel": out_features}.get(scaling)
        self.scale = parameter(learned) if learned else None
        self.gate_weight, self.gate_bias = (parameter(1, in_features), parameter(1)) if gate else (None, None)
        self.norm_weight = parameter(in_features) if norm != "none" else None
        self.norm_bias = parameter(in_features) if norm == "layer_norm" else None
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """The start of a training; `init` as in the class."""
        if init not in INITS:
            raise ValueError(f"BottleneckAdapter: init must be one of {', '.join(INITS)}, got {init!r}")
        for vector in (self.down_bias, self.up_bias, self.norm_bias, self.gate_weight, self.gate_bias):
            if vector is not None:
                vector.zero_()
        for vector in (self.scale, self.norm_weight):
            if vector is not None:
                vector.fill_(1)
        if init in ("mam", "lora"):
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
            self.up_weight.zero_()
            return
        for weight in (self.down_weight, self.up_weight):
            deviation = _DEVIATION[init]
            if init == "bert":
                nn.init.normal_(weight, std=deviation)
            else:
                nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y [..., N]. Without a residual r it is x itself, the serial form."""
        if residual is not None:
            x = x.to(residual.dtype)  # T5 keeps its last projection, and so r, in float32
        dropout_p = self.dropout_p if self.training else 0.0
        return bottleneck_adapter(
            x, residual, self.down_weight, self.down_bias, self.up_weight, self.up_bias,
            activation=self.activation, scaling=self.scaling, scale=self.scale, gate=self._gate(x),
            norm=self.norm, norm_weight=self.norm_weight, norm_bias=self.norm_bias,
            dropout_p=dropout_p, dropout_on=self.dropout_on, seed=new_seed(x.device) if dropout_p else None,
        )  # fmt: skip

    def _gate(self, x: Tensor) -> Tensor | None:
        """g [...], or None where it is 1."""
        dtype, gate = self.down_weight.dtype, None
        if self.gate_weight is not None:
            gate = nn.functional.linear(x.to(dtype), self.gate_weight, self.gate_bias).sigmoid().squeeze(-1).to(dtype)
        if self.training and self.drop_path:
            samples = (*x.shape[:-1][:1], *[1] * (x.dim() - 2))
            kept = torch.rand(samples, device=x.device) >= self.drop_path
            kept = (kept.to(dtype) / (1 - self.drop_path)).expand(x.shape[:-1])
            gate = kept if gate is None else gate * kept
        return gate

    def extra_repr(self) -> str:
        (E, K), N = self.down_weight.shape, self.up_weight.shape[0]
        return f"{K} -> {E} -> {N}, activation={self.activation}, scaling={self.scaling}"


READS = {  # what an adapter may read, by insertion form; the first is what it reads if nothing is said
    "serial": ("output", "sum"),
    "parallel": ("input", "stream"),
}
OF_STREAM = frozenset({"sum", "stream"})


class BottleneckAdapters(nn.ModuleDict):
    """The adapters of one block by name. Those of `active_names` run; `reads_by_name` says of each what it reads.

    y is the block's output, x its input; stream is the model's residual stream, to which added(y) will be added: y, or
    y scaled (Granite) or normed (Gemma 2). Parallel adapters read x ("input") or the stream ("stream") and are summed
    on y; then the serial ones run, each on the y that the one before it gave, and read that ("output") or
    added(y) + stream ("sum"), normed where the model will norm the sum.
    """

    def __init__(self):
        super().__init__()
        self.active_names: tuple[str, ...] = ()
        self.reads_by_name: dict[str, str] = {}

    @property
    def needs_stream(self) -> bool:
        """Whether an active adapter reads the residual stream."""
        return any(self.reads_by_name[name] in OF_STREAM for name in self.active_names)

    def forward(
        self, x: Tensor, y: Tensor, stream: Tensor | None = None, norm: nn.Module | None = None,
        added: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        if stream is None and self.needs_stream:
            raise RuntimeError("bottleneck adapters: one reads the residual stream, which the layer has not handed on")
        for name in self.active_names:
            if (reads := self.reads_by_name[name]) in READS["parallel"]:
                y = self[name](x if reads == "input" else stream, y)
        for name in self.active_names:
            if (reads := self.reads_by_name[name]) == "output":
                y = self[name](y)
            elif reads == "sum":
                both = (y if added is None else added(y)) + stream
                y = self[name](both if norm is None else norm(both), y)
        return y
