// Runs the resampling kernels on the processor: cases come on stdin, results go to stdout, all in native byte order.
//
//   1 in_plane: words, pixels, floats of output, low, inverse width, rows and columns of output along stored axes;
//               then the table, the pixels
//   2 gather:   words, slices, floats a slice, planes; then the table, the slices one after the other
//   3 texture:  depth, height, width, rows a thread, levels as a float, clip; then the input. Twelve sums come back as
//               pairs of words in the place of floats
#include "launch.h"

#include KERNELS

#include <cstdio>
#include <cstdlib>
#include <vector>

template <class T> static void get(T* to, size_t count) {
    if (std::fread(to, sizeof(T), count, stdin) != count) {
        std::exit(2);
    }
}

int main() {
    unsigned kind;
    while (std::fread(&kind, sizeof kind, 1, stdin) == 1) {
        std::vector<float> out;
        if (kind == 1) {
            unsigned counts[3], along[2];
            float window[2];
            get(counts, 3);
            get(window, 2);
            get(along, 2);
            std::vector<unsigned> words(counts[0]);
            std::vector<short> hu(counts[1]);
            get(words.data(), words.size());
            get(hu.data(), hu.size());
            out.assign(counts[2], NAN);
            Index block = {32, 8, 1};
            Index grid = {(along[1] + 31) / 32, (along[0] + 7) / 8, 1};
            launch(grid, block, [&] { in_plane_f32(hu.data(), words.data(), window[0], window[1], out.data()); });
        } else if (kind == 3) {
            unsigned shape[4], clip;
            float levels;
            get(shape, 4);
            get(&levels, 1);
            get(&clip, 1);
            std::vector<float> input((size_t)shape[0] * shape[1] * shape[2]);
            get(input.data(), input.size());
            std::vector<unsigned long long> sums(12, 0);
            Index grid = {(shape[2] + 63) / 64, shape[0], (shape[1] + shape[3] - 1) / shape[3]};
            launch(grid, {64, 1, 1}, [&] {
                texture_f32(input.data(), shape[0], shape[1], shape[2], shape[3], levels, (int)clip, sums.data());
            });
            out.resize(24);
            std::memcpy(out.data(), sums.data(), 24 * sizeof(float));
        } else {
            unsigned counts[4];
            get(counts, 4);
            std::vector<unsigned> words(counts[0]);
            std::vector<float> slices((size_t)counts[1] * counts[2]);
            get(words.data(), words.size());
            get(slices.data(), slices.size());
            std::vector<unsigned long long> addresses;
            for (unsigned k = 0; k < counts[1]; ++k) {
                addresses.push_back((unsigned long long)(slices.data() + (size_t)k * counts[2]));
            }
            out.assign((size_t)counts[3] * counts[2], NAN);
            Index grid = {(counts[2] + 255) / 256, counts[3], 1};
            launch(grid, {256, 1, 1}, [&] { gather_f32(addresses.data(), words.data(), counts[2], out.data()); });
        }
        std::fwrite(out.data(), sizeof(float), out.size(), stdout);
    }
    return 0;
}
