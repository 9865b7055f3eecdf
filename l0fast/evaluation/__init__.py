"""How good a policy is: episodes or direct answers on benchmarks, scored, with intervals."""
