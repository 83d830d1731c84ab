"""Many runs: ablations under controlled conditions, and what may be concluded from them."""
