"""What can run a call: the table of kernels (``devices``), exact attention (``exact``), and the torch ops (``ops``)."""
