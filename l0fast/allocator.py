"""torch's expandable segments, which many export (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), where they can't be.

a rank whose memory an engine reads    another process gets at such a segment by its descriptor (pidfd_getfd), which containers
                                       and Ubuntu deny: "Operation not permitted" (pytorch/pytorch#165685), at the first new weights
an engine that sleeps                  torch_memory_saver gives back what cudaMalloc gave, and such segments are mapped: it
                                       refuses, or, where only PYTORCH_ALLOC_CONF asks for them, gives nothing back
"""

import re
from collections.abc import Mapping

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_ASKED = re.compile(r"(\bexpandable_segments\s*:\s*)true\b", re.IGNORECASE)


def without_expandable_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of these that ask for them, as they are without; all else that they say stays."""
    return {
        name: _ASKED.sub(r"\1False", said)
        for name in VARIABLES
        if (said := environment.get(name)) is not None and _ASKED.search(said)
    }
