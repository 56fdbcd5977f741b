// Packing weights into gap planes, and proving that packed bytes are well-formed. Host only, compiled once.
#pragma once
#include "core/gap_planes.h"

namespace effvlm {

// Fills the directory (tiles, base) for weights (E,R,C) of contiguous values in −1 … 1 (levels 3) or −2 … 2 (levels 5), and
// returns how many words of data they take, padding included. Throws on other values.
std::int64_t gap_planes_measure(const std::int8_t* weights, const GapPlanes& shape, std::uint32_t* tiles, std::uint32_t* base,
                                int threads);

// Writes the data, all `words` of it, for a directory that gap_planes_measure filled.
void gap_planes_write(const std::int8_t* weights, const GapPlanes& planes, std::uint32_t* data, int threads);

// Throws, naming the tile and what is wrong, unless matrices [first, last) are what gap_planes_write could have written: every
// entry inside its tile, rows and columns inside the matrix, all counts and entry points right, no bit set that means nothing.
void gap_planes_validate(const GapPlanes& planes, std::int64_t first, std::int64_t last, int threads);

}  // namespace effvlm
