"""Small nets and images for the tests: 8x8 pixels, one channel, 16 patches, two blocks of width 32."""

import timm
import torch
from torch import nn

import qat

SIZE = (1, 8, 8)
KWARGS = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
VIT = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"


def identical(ours, theirs):
    """True if two state dicts, or two sequences of tensors, are equal to the bit."""
    if isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return False
        ours = [ours[name] for name in theirs]
        theirs = theirs.values()
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def moved_by_a_step(net, x):
    """Names of parameters that one step of AdamW moves; all gradients have to be finite."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0).step()
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def randn(*shape, seed=0):
    """Normal numbers, a function of the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(net):
    """Draw every parameter anew, so that no bias is zero and attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
    return net


def vit(name=VIT, **changes):
    """A float net in eval mode; `changes` go to timm."""
    torch.manual_seed(0)
    return shake(timm.create_model(name, **{**KWARGS, **changes})).eval()


def images(n=8, seed=0):
    """Random images with both signs."""
    return randn(n, *SIZE, seed=seed)


def convert(net, recipe="ofq", **knobs):
    """The net converted for images of `SIZE`: by a recipe, or by the preset of this name."""
    if isinstance(recipe, str):
        recipe = qat.recipe(recipe, **knobs)
    return qat.convert(net, recipe, input_size=SIZE)


def fitted(net, x, recipe="ofq", **knobs):
    """The net in eval mode, quantized for images like these, with scales from them; by a recipe or a preset."""
    if isinstance(recipe, str):
        recipe = qat.recipe(recipe, **knobs)
    qat.convert(net, recipe, input_size=tuple(x.shape[1:]))
    if isinstance(recipe, qat.PtqRecipe):
        qat.ptq.calibrate(net, [x])
    else:
        qat.initialize_scales(net, [x])
    return net.eval()


def with_scales(net):
    """The net with scales from data."""
    return qat.initialize_scales(net, [images()])


def converted(preset="ofq", name=VIT, **knobs):
    """A quantized net, scales NaN."""
    return convert(vit(name), preset, **knobs)


def quantized(preset="ofq", name=VIT, **knobs):
    """A quantized net with scales from data, in eval mode."""
    return with_scales(converted(preset, name, **knobs))


def sites(net):
    """Sites of a net by name."""
    return {site.name: site for site in qat.iter_quantizers(net)}


def float_recipe(attention, **knobs):
    """All swaps, no rounding."""
    return qat.recipe(
        "ofq",
        attention=attention,
        qk_bias="fold",
        weight_quantizer="float",
        act_quantizer="float",
        **knobs,
    )


def logits(net, x=None):
    """Output of a net in eval mode."""
    with torch.no_grad():
        return net.eval()(images() if x is None else x)


def parameters(net: nn.Module):
    """Names, shapes and identities."""
    return [(name, tuple(p.shape), id(p)) for name, p in net.named_parameters()]


def watched(net, run=logits):
    """What enters each quantizer and what it gives when a net runs, by name."""
    seen = {}
    hooks = [
        site.quantizer.register_forward_hook(
            lambda m, args, out, name=site.name: seen.__setitem__(
                name, (args[0].detach(), out.detach())
            )
        )
        for site in qat.iter_quantizers(net)
    ]
    run(net)
    for hook in hooks:
        hook.remove()
    return seen


def kept_bytes(make, parameters):
    """Bytes that `make()` keeps for its backward pass, each storage once and those of `parameters` not counted; and what it gives."""
    seen, own = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = make()
    return sum(size for pointer, size in seen.items() if pointer not in own), out
