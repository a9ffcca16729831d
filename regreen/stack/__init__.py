"""The local integrated stack: five services as processes on this machine."""
