"""The policy service, whose libraries are kept from reporting before any of them is loaded."""

from regreen.quiet import be_quiet

be_quiet()
