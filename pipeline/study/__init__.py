"""What a cheaper precision costs: the same models under two policies, compared number by number."""
