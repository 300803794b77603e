"""An open shim of the MoAI Platform."""
