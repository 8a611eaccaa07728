"""Time and memory of a quantized training step in those of the float step of the same net: forward, loss, backward and AdamW.

Run by `make step-time`. How it is measured: `step_frame.py`. `[recompute]` rows keep less for backward, qat.set_execution(memory=...).
"""

from __future__ import annotations

import dataclasses

from evidence import step_arms, step_frame

# Other recipes of the same net: without offsets, with one step a tensor, with learned steps for weights too, with half steps.
step_arms.ARMS |= {
    "linears without offsets": step_arms.Arm({"attention": "float", "offsets": False}),
    "lsq": step_arms.Arm({}, recipe="lsq"),
    "seq": step_arms.Arm({}, recipe="seq"),
    "deploy": step_arms.Arm({}, recipe="deploy_w4a4"),
}
# Attention alone keeps something that could be computed again.
for name in ("ofq without qkr", "ofq"):
    step_arms.ARMS[f"{name} [recompute]"] = dataclasses.replace(step_arms.ARMS[name], memory="recompute")

if __name__ == "__main__":
    arms = [name for name in step_arms.ARMS if name != step_arms.FLOAT]
    step_frame.run(__file__, __doc__, {name: step_frame.arm(name) for name in arms}, bits=2)
