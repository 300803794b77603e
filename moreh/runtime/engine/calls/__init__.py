"""What a script does with the results of a call: reads logits, calls `backward()` once, several times, or never."""
