"""One module per backend, each with ``forward(input, series, geometry)``, ``input_grad(grad, input,
series, geometry)``, ``weight_grad`` of the same, ``series_sum(series)`` and ``supports(call)``."""
