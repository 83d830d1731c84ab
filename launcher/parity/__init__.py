"""The proof that every (stage, precision) cell trains the same model: reference, cases, judgement, verdict."""
