"""The arithmetic that deserves its own kernels. Knows torch, and triton where it is installed; nothing of l0fast.

Every operation has a reference in plain PyTorch beside it, which is what runs where there is no GPU or no triton.
"""
