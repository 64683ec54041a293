"""The operators: one file each, with its autograd.Function, its function and its nn.Module."""
