"""State dicts named and shaped as the paper's code writes them, with random numbers, and their logits by plain formulas.

Written from the description of that code's arithmetic (scales per position, offsets, StatsQ), with nothing of qat in it.
"""

import math

import torch
from torch.nn import functional as F


class Writer:
    """Collects random tensors by name."""

    def __init__(self, seed=0):
        self.state, self.generator = {}, torch.Generator().manual_seed(seed)

    def add(self, name, *shape, mean=0.0, std=0.1):
        self.state[name] = mean + std * torch.randn(*shape, generator=self.generator)

    def scale(self, name, n, around=0.7):
        self.state[name] = around * torch.exp(0.15 * torch.randn(n, generator=self.generator))

    def norm(self, name, width):
        self.add(f"{name}.weight", width, mean=1.0)
        self.add(f"{name}.bias", width)

    def plain(self, name, out, width):
        self.add(f"{name}.weight", out, width, std=width**-0.5)
        self.add(f"{name}.bias", out)

    def offsets(self, name, n, std=0.08):
        self.add(f"{name}.move_b4.bias", n, std=std)
        self.add(f"{name}.move_aft.bias", n, std=std)

    def linear(self, name, out, width, rows):
        self.plain(name, out, width)
        self.offsets(name, width)
        self.scale(f"{name}.input_quant_fn.s", rows)
        self.state[f"{name}.statsq_fn.clip_val"] = torch.tensor([2.0])

    def outer(self, name, width, classes):
        self.plain(name, classes, width)
        self.offsets(name, width)
        self.scale(f"{name}.input_quant_fn.s", 1, around=0.02)
        self.scale(f"{name}.lsqw_fn.s", classes, around=0.002)

    def stem(self, name, width, chans, patch, side):
        self.add(f"{name}.weight", width, chans, patch, patch, std=(chans * patch * patch) ** -0.5)
        self.add(f"{name}.bias", width)
        self.scale(f"{name}.input_quant_fn.s", chans, around=0.03)
        self.state[f"{name}.input_quant_fn.signed"] = torch.ones(1)
        self.scale(f"{name}.lsqw_fn.s", width, around=0.004)
        self.offsets(name, side * side, std=0.02)

    def attention(self, name, width, heads, tokens, *, qkr):
        self.linear(f"{name}.proj", width, width, tokens)
        self.scale(f"{name}.quan_a_v_fn.s", width)
        self.scale(f"{name}.quan_a_softmax_fn.s", tokens, around=0.15)
        self.add(f"{name}.move_v_aft.bias", width)
        if not qkr:
            self.linear(f"{name}.qkv", 3 * width, width, tokens)
            self.add(f"{name}.move_qkv_b4.bias", 3 * width)
            for role in "qk":
                self.scale(f"{name}.quan_a_{role}_fn.s", tokens)
                self.add(f"{name}.move_{role}_aft.bias", width)
            return
        for role in "qk":
            self.add(f"{name}.{role}.weight", width, width, std=width**-0.5)
        self.plain(f"{name}.v", width, width)
        self.offsets(f"{name}.quant_x_4_qkv", width)
        self.scale(f"{name}.quant_x_4_qkv.input_quant_fn.s", tokens)
        self.scale(f"{name}.quan_a_qkx_fn.s", tokens * heads)
        for place in ("b4", "aft"):
            self.add(f"{name}.move_qkx_{place}.bias", heads * width)
        self.add(f"{name}.move_v_b4.bias", width)
        self.state |= {f"{name}.{n}.clip_val": torch.tensor([2.0]) for n in ("qk_quant", "v_quant")}

    def block(self, name, width, heads, tokens, *, qkr, rows=None):
        self.norm(f"{name}.norm1", width)
        self.attention(f"{name}.attn", width, heads, tokens, qkr=qkr)
        self.norm(f"{name}.norm2", width)
        self.linear(f"{name}.mlp.fc1", 4 * width, width, rows or tokens)
        self.linear(f"{name}.mlp.fc2", width, 4 * width, rows or tokens)


def deit(
    *, qkr=True, depth=1, width=192, side=16, patch=8, chans=3, classes=5, distilled=True, seed=0
):
    """A DeiT's state dict."""
    w, tokens = Writer(seed), (side // patch) ** 2 + 1 + distilled
    w.add("cls_token", 1, 1, width)
    w.add("pos_embed", 1, tokens, width)
    if distilled:
        w.add("dist_token", 1, 1, width)
    w.stem("patch_embed.proj", width, chans, patch, side)
    for i in range(depth):
        w.block(f"blocks.{i}", width, width // 64, tokens, qkr=qkr)
    w.norm("norm", width)
    for head in ("head", "head_dist")[: 1 + distilled]:
        w.outer(head, width, classes)
    return w.state


def swin(*, qkr=True, depths=(2, 1), width=96, side=32, window=4, classes=5, seed=0):
    """A Swin's state dict: torchvision's names, a bias in each merging, one scale per column for the MLPs."""
    w, columns = Writer(seed), side // 4
    w.stem("features.0.0", width, 3, 4, side)
    w.norm("features.0.2", width)
    for stage, depth in enumerate(depths):
        if stage:
            columns //= 2
            w.norm(f"features.{2 * stage}.norm", 4 * width)
            w.linear(f"features.{2 * stage}.reduction", 2 * width, 4 * width, columns)
            width *= 2
        part = min(window, columns)
        for i in range(depth):
            name = f"features.{2 * stage + 1}.{i}"
            w.block(name, width, width // 32, part**2, qkr=qkr, rows=columns)
            w.add(f"{name}.attn.relative_position_bias_table", (2 * part - 1) ** 2, width // 32)
            w.state[f"{name}.attn.relative_position_index"] = window_index(part).flatten()
    w.norm("norm", width)
    w.outer("head", width, classes)
    return w.state


def window_index(window):
    """Row of the table for each pair of positions: how far apart they are in rows and columns."""
    y, x = (torch.arange(window**2) // window, torch.arange(window**2) % window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


def rounded(x, step, low, high):
    step = step.clamp_min(1e-5)
    return (x / step).clamp(low, high).round() * step


def lsq(x, step, bits, *, signed=True):
    n = 2 ** (bits - 1)
    return rounded(x, step, -n if signed else 0, n - 1 if signed else 2 * n - 1)


def statsq(weight, bits):
    step, n = 2 * weight.abs().mean(1, keepdim=True), 2 ** (bits - 1)
    return step * ((weight / step).clamp(-1, 1 - 1e-6) * n - 0.5).round().add(0.5) / n


class Reader:
    """Logits of a state dict."""

    def __init__(self, state, bits, act_bits, eps):
        self.sd, self.bits, self.act_bits, self.eps = state, bits, act_bits, eps

    def norm(self, name, x):
        return F.layer_norm(
            x, x.shape[-1:], self.sd[f"{name}.weight"], self.sd[f"{name}.bias"], self.eps
        )

    def shifted(self, name, x, *, signed=True):
        step = self.sd[f"{name}.input_quant_fn.s"].unsqueeze(-1)
        return (
            lsq(x + self.sd[f"{name}.move_b4.bias"], step, self.act_bits, signed=signed)
            + self.sd[f"{name}.move_aft.bias"]
        )

    def linear(self, name, x, *, signed=True):
        return (
            self.shifted(name, x, signed=signed) @ statsq(self.sd[f"{name}.weight"], self.bits).T
            + self.sd[f"{name}.bias"]
        )

    def outer(self, name, x):
        weight = lsq(self.sd[f"{name}.weight"], self.sd[f"{name}.lsqw_fn.s"][:, None], 8)
        x = (
            lsq(x + self.sd[f"{name}.move_b4.bias"], self.sd[f"{name}.input_quant_fn.s"], 8)
            + self.sd[f"{name}.move_aft.bias"]
        )
        return x @ weight.T + self.sd[f"{name}.bias"]

    def stem(self, name, x):
        side = x.shape[-1]
        before, after = (
            self.sd[f"{name}.move_{place}.bias"].view(side, side) for place in ("b4", "aft")
        )
        x = lsq(x + before, self.sd[f"{name}.input_quant_fn.s"].view(-1, 1, 1), 8) + after
        weight = lsq(self.sd[f"{name}.weight"], self.sd[f"{name}.lsqw_fn.s"].view(-1, 1, 1, 1), 8)
        return F.conv2d(x, weight, self.sd[f"{name}.bias"], stride=weight.shape[-1])

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)), signed=False)

    def attention(self, name, x, heads, bias=0.0):
        scores, v = (self.qkr if f"{name}.q.weight" in self.sd else self.qkv)(name, x, heads)
        probs = (scores * math.sqrt(heads / x.shape[-1]) + bias).softmax(-1)
        probs = lsq(
            probs, self.sd[f"{name}.quan_a_softmax_fn.s"].unsqueeze(-1), self.act_bits, signed=False
        )
        v = (
            lsq(v, self.sd[f"{name}.quan_a_v_fn.s"], self.act_bits)
            + self.sd[f"{name}.move_v_aft.bias"]
        )
        out = torch.einsum("bhnm,bmhd->bnhd", probs, v.unflatten(-1, (heads, -1))).flatten(2)
        return self.linear(f"{name}.proj", out)

    def qkr(self, name, x, heads):
        xq = self.shifted(f"{name}.quant_x_4_qkv", x)
        wq, wk = (self.sd[f"{name}.{role}.weight"].unflatten(0, (heads, -1)) for role in "qk")
        folded = statsq(torch.einsum("hdc,hde->hce", wq, wk).flatten(0, 1), self.bits)
        y = (xq @ folded.T + self.sd[f"{name}.move_qkx_b4.bias"]).unflatten(-1, (heads, -1))
        y = lsq(y, self.sd[f"{name}.quan_a_qkx_fn.s"].view(-1, heads, 1), self.act_bits)
        y = y + self.sd[f"{name}.move_qkx_aft.bias"].view(heads, -1)
        v = (
            xq @ statsq(self.sd[f"{name}.v.weight"], self.bits).T
            + self.sd[f"{name}.v.bias"]
            + self.sd[f"{name}.move_v_b4.bias"]
        )
        return torch.einsum("bnc,bmhc->bhnm", xq, y), v

    def qkv(self, name, x, heads):
        q, k, v = (self.linear(f"{name}.qkv", x) + self.sd[f"{name}.move_qkv_b4.bias"]).chunk(3, -1)
        q, k = (
            lsq(t, self.sd[f"{name}.quan_a_{role}_fn.s"].unsqueeze(-1), self.act_bits)
            + self.sd[f"{name}.move_{role}_aft.bias"]
            for t, role in ((q, "q"), (k, "k"))
        )
        return torch.einsum(
            "bnhd,bmhd->bhnm", q.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads, -1))
        ), v


def deit_logits(state, images, bits, act_bits):
    """Mean of the heads."""
    r = Reader(state, bits, act_bits, 1e-6)
    x = r.stem("patch_embed.proj", images).flatten(2).transpose(1, 2)
    tokens = [
        state[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in state
    ]
    x = torch.cat([*tokens, x], 1) + state["pos_embed"]
    i = 0
    while f"blocks.{i}.norm1.weight" in state:
        x = x + r.attention(f"blocks.{i}.attn", r.norm(f"blocks.{i}.norm1", x), x.shape[-1] // 64)
        x = x + r.mlp(f"blocks.{i}.mlp", r.norm(f"blocks.{i}.norm2", x))
        i += 1
    x = r.norm("norm", x)
    return torch.stack([
        r.outer(head, x[:, j]) for j, head in enumerate(("head", "head_dist")[: len(tokens)])
    ]).mean(0)


def windows(x, side):
    """(B, H, W, C) to (B, windows, side*side, C)."""
    b, h, w, c = x.shape
    return (
        x
        .view(b, h // side, side, w // side, side, c)
        .transpose(2, 3)
        .reshape(b, -1, side * side, c)
    )


def shifted_window_mask(size, side, shift):
    """(windows, 1, N, N): -100 between pixels that the roll brought together from far apart."""
    zone = torch.zeros(size, dtype=torch.long)
    zone[-side:], zone[-shift:] = 1, 2
    zones = windows((3 * zone[:, None] + zone).view(1, size, size, 1), side)[0, :, :, 0]
    return torch.where(zones[:, :, None] == zones[:, None], 0.0, -100.0).unsqueeze(1)


def swin_attention(r, name, x, side, *, shift):
    """Attention in windows of a map, rolled by `shift`."""
    size, table = x.shape[1], r.sd[f"{name}.relative_position_bias_table"]
    bias = table[window_index(side)].permute(2, 0, 1)
    parts = windows(x.roll((-shift, -shift), (1, 2)), side)
    mask = shifted_window_mask(size, side, shift) if shift else torch.zeros(parts.shape[1], 1, 1, 1)
    parts = torch.stack(
        [
            r.attention(name, parts[:, i], table.shape[1], bias + mask[i])
            for i in range(parts.shape[1])
        ],
        1,
    )
    grid = (
        parts
        .view(len(x), size // side, size // side, side, side, -1)
        .transpose(2, 3)
        .reshape(x.shape)
    )
    return grid.roll((shift, shift), (1, 2))


def swin_logits(state, images, bits, act_bits, window=4):
    """One head on the mean over the map."""
    r, stage = Reader(state, bits, act_bits, 1e-5), 0
    x = r.norm("features.0.2", r.stem("features.0.0", images).permute(0, 2, 3, 1))
    while f"features.{2 * stage + 1}.0.norm1.weight" in state:
        if stage:
            quarters = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            x = r.linear(
                f"features.{2 * stage}.reduction",
                r.norm(f"features.{2 * stage}.norm", torch.cat(quarters, -1)),
            )
        i = 0
        while (name := f"features.{2 * stage + 1}.{i}") + ".norm1.weight" in state:
            shift = window // 2 if i % 2 and x.shape[1] > window else 0
            x = x + swin_attention(
                r, f"{name}.attn", r.norm(f"{name}.norm1", x), window, shift=shift
            )
            x = x + r.mlp(f"{name}.mlp", r.norm(f"{name}.norm2", x))
            i += 1
        stage += 1
    return r.outer("head", r.norm("norm", x).mean((1, 2)))
