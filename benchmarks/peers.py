"""Training steps of other quantization libraries beside qat's, on the same timm net, batch and machine: time and bytes kept for backward.

Run by `make peers`, which installs them beside .venv; one that cannot be imported is left out with a note. W4 A4 in all `nn.Linear`; none
of the others quantizes what an attention does between them, the rows of OFQ do. How it is measured: `step_frame.py`.
"""

from __future__ import annotations

from importlib import metadata

from benchmarks import step_frame
from benchmarks.peer_nets import PEERS
from benchmarks.step_frame import FLOAT, Row, arm

LIBRARIES = ("torchao", "brevitas", "nvidia-modelopt")
OURS = {
    "qat, linears: W4 StatsQ per channel, A4 per token, learned, offsets; first and last layer W8 A8": arm("linears"),
    "qat, OFQ without QKR: also queries, keys, values and probabilities A4": arm("ofq without qkr"),
    "qat, OFQ: also query-key reparameterization": arm("ofq"),
}


def peer(name: str) -> Row:
    """The row of another library."""
    return lambda model, images, bits: (PEERS[name][1](arm(FLOAT)(model, images, bits)[0], images).train(), None)


if __name__ == "__main__":
    there = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    versions = ", ".join(f"{library} {there.get(library, 'not installed')}" for library in LIBRARIES)
    rows = OURS | {f"{name}: {what}": peer(name) for name, (what, _) in PEERS.items()}
    step_frame.run(__file__, __doc__ or "", rows, bits=4, what=versions)
