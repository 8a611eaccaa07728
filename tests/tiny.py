"""Small models and images: 8 x 8 pixels, one channel, 16 patches, two blocks of width 32."""

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
    """True if two state dicts, or two sequences of tensors, are bitwise equal."""
    if isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return False
        ours = [ours[name] for name in theirs]
        theirs = theirs.values()
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def moved_by_a_step(net, x):
    """Names of the parameters that one step of AdamW changes; all gradients must be finite."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0).step()
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def randn(*shape, seed=0):
    """Random normal numbers that depend only on the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(net):
    """Make all parameters random, so that no bias is zero and attention is not uniform."""
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
    """A float model in eval mode; `changes` are arguments of `timm.create_model`."""
    torch.manual_seed(0)
    return shake(timm.create_model(name, **{**KWARGS, **changes})).eval()


def images(n=8, seed=0):
    """Random images with both signs."""
    return randn(n, *SIZE, seed=seed)


def convert(net, recipe="ofq", **knobs):
    """Convert a model for images of `SIZE` with a recipe, or with the preset of this name."""
    if isinstance(recipe, str):
        recipe = qat.recipe(recipe, **knobs)
    return qat.convert(net, recipe, input_size=SIZE)


def fitted(net, x, recipe="ofq", **knobs):
    """Convert a model with a recipe or a preset, and set its scales from the images `x`."""
    if isinstance(recipe, str):
        recipe = qat.recipe(recipe, **knobs)
    qat.convert(net, recipe, input_size=tuple(x.shape[1:]))
    if isinstance(recipe, qat.PtqRecipe):
        qat.ptq.calibrate(net, [x])
    else:
        qat.initialize_scales(net, [x])
    return net.eval()


def with_scales(net):
    """Set the scales of a model from images."""
    return qat.initialize_scales(net, [images()])


def converted(preset="ofq", name=VIT, **knobs):
    """A quantized model whose scales are NaN."""
    return convert(vit(name), preset, **knobs)


def quantized(preset="ofq", name=VIT, **knobs):
    """A quantized model in eval mode with scales from images."""
    return with_scales(converted(preset, name, **knobs))


def sites(net):
    """Sites of a model by name."""
    return {site.name: site for site in qat.iter_quantizers(net)}


def float_recipe(attention, **knobs):
    """A recipe that replaces all modules, but rounds nothing."""
    return qat.recipe(
        "ofq",
        attention=attention,
        qk_bias="fold",
        weight_quantizer="float",
        act_quantizer="float",
        **knobs,
    )


def logits(net, x=None):
    """Output of a model in eval mode."""
    with torch.no_grad():
        return net.eval()(images() if x is None else x)


def parameters(net: nn.Module):
    """Name, shape and identity of each parameter."""
    return [(name, tuple(p.shape), id(p)) for name, p in net.named_parameters()]


def watched(net, run=logits):
    """Input and output of each quantizer, by name, when a model runs."""
    calls = {}
    hooks = [
        site.quantizer.register_forward_hook(
            lambda m, args, out, name=site.name: calls.__setitem__(
                name, (args[0].detach(), out.detach())
            )
        )
        for site in qat.iter_quantizers(net)
    ]
    run(net)
    for hook in hooks:
        hook.remove()
    return calls


def kept_bytes(make, parameters):
    """Bytes that `make()` saves for its backward pass, and its result.

    Each storage counts once; storages of `parameters` do not count.
    """
    sizes = {}
    excluded = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = make()
    return sum(size for pointer, size in sizes.items() if pointer not in excluded), out
