import os

from hypothesis import settings

# The first example pays for imports: no example is judged by its time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Where there is no GPU, Triton interprets its kernels. It reads this when it is imported.
try:
    import torch
except ImportError:
    pass
else:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
