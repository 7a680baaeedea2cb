"""Other programs that run models: what they are given, and the proof that they compute what is stored."""
