"""Made from a seed alone, for demos, tests and benchmarks: pictures, their scores, a tiny model."""
