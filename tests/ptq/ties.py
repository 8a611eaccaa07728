"""Codes that lie on a threshold within float rounding: which there are, and what a net computes with them on the other side.

A value on a threshold has one code on one processor and its neighbour on another, since sums in float32 depend on their order.
"""

import contextlib

import qat

# In codes. Values are sums of up to a few dozen terms, known to some units of 2^-24, of up to 255 codes: 255 * 2^-24 = 1.5e-5.
NEAR = 4e-5


class Ties:
    """Watches the activation quantizers of a net for codes on a threshold."""

    def __init__(self, net):
        self.net = net
        self.sites = [
            s for s in qat.iter_quantizers(net) if not s.is_weight and not s.quantizer.is_float
        ]

    @contextlib.contextmanager
    def run(self, flips=()):
        """Let the codes named in `flips` take the other side in what runs inside the `with` block.

        Yields:
            (quantizer, call, element, code on the other side) of every value near a threshold; filled while the net runs.
        """
        candidates, calls = [], {}
        forced = {(name, call, element): code for name, call, element, code in flips}

        def hook(name):
            def note(quantizer, args, output):
                call = calls[name] = calls.get(name, -1) + 1
                grid = quantizer.grid(args[0])
                place = grid.to_code_coordinates(args[0]).flatten()
                distance = (place - place.floor() - 0.5).abs()
                inside = (place > grid.qmin) & (place < grid.qmax)
                codes = quantizer.codes(args[0]).flatten().float()
                for element in ((distance < NEAR) & inside).nonzero().flatten().tolist():
                    other = float(2 * place[element].floor() + 1 - codes[element])
                    candidates.append((name, call, element, other))
                mine = {
                    element: code
                    for (site, at, element), code in forced.items()
                    if (site, at) == (name, call)
                }
                if not mine:
                    return None
                for element, code in mine.items():
                    codes[element] = code
                changed = grid.dequantize(codes.view_as(output)).flatten()
                result = output.clone().flatten()
                result[list(mine)] = changed[list(mine)]
                return result.view_as(output)

            return note

        handles = [site.quantizer.register_forward_hook(hook(site.name)) for site in self.sites]
        try:
            yield candidates
        finally:
            for handle in handles:
                handle.remove()

    def explain(self, compute, difference, tolerance, most=4):
        """Flip codes on thresholds, one by one, until what is computed agrees.

        Args:
            compute: called with the hooks on.
            difference: of its result from the expected one, a number.
            tolerance: of that number.
            most: flips.

        Returns:
            The flips: none where it agrees at once, None where no flips explain the difference.
        """
        flips = ()
        with self.run() as candidates:
            best = difference(compute())
        while best > tolerance and len(flips) < most:
            tried = []
            flipped = {flip[:3] for flip in flips}
            for candidate in candidates:
                if candidate[:3] not in flipped:
                    with self.run((*flips, candidate)):
                        tried.append((difference(compute()), candidate))
            if not tried or min(tried)[0] >= best:
                return None
            best, flip = min(tried)
            flips = (*flips, flip)
            with self.run(flips) as candidates:
                compute()
        return flips if best <= tolerance else None
