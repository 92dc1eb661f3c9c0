"""One module per backend, each with ``forward``, ``input_grad``, ``weight_grad``, ``series_sum``
and ``supports(call)``."""
