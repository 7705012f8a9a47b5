"""Which precision each layer gets at which step: measured errors, their costs, and the cheapest choice under a budget."""
