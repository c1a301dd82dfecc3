"""What is evaluated: questions in, scores out."""

from lit_vlm.tasks.held_out import Answer, HeldOutScores, answer_records, evaluate_held_out

__all__ = ["Answer", "HeldOutScores", "answer_records", "evaluate_held_out"]
