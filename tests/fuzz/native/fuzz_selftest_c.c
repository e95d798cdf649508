/* A target that is wrong about what begins with "HA": does the runner find and report it? */
#include "rig.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	must(size < 2 || data[0] != 'H' || data[1] != 'A', "the mistake that was put in");
	return 0;
}
