"""What will happen: a pure function from a request, a topology and facts to a frozen Plan."""
