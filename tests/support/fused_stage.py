"""`python -m stages` as on a GPU, where train.attention has an effect.

With FlexAttention's uncompiled form, which has gradients on any device, although torch refuses to compute them on a CPU.
"""

import sys

from torch.nn.attention import flex_attention

from stages.__main__ import main
from stages.engines import training

if __name__ == "__main__":
    vars(flex_attention)["_validate_device"] = lambda *_: None
    vars(training)["select_fused"] = lambda attention: attention == "fused"
    main(sys.argv[1:])
