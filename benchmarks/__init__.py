"""How fast the kernels, the layers and the paper's networks are, beside what PyTorch's own
convolutions take."""
