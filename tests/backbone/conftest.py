"""Settings of the backbone's tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # for models this small, threads cost more than they give
