"""Models judged by what they do: a task's examples, a model's answers, and the metrics that compare them."""
