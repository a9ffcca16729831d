"""The judge: was the fix genuine, or was the validation tampered with?

- It runs no code and changes no reward: it returns Verdicts, the driver composes.
- Rules decide first; a language model can add findings, never take one away.
"""
