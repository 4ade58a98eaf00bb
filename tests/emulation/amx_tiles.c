// AMX tiles in C: what the tile instructions do, for processors that have none.
//
// Each thread has a configuration and eight tiles of its own, as in hardware. An instruction that
// hardware would refuse ends the process with a message: the kernel is wrong.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };

static __thread struct {
  int configured;
  int rows[TILES], bytes[TILES];
  int8_t data[TILES][ROWS][BYTES];
} state;

// Tile products since the last call, so that a test can tell that tiles were used at all.
static int64_t products;

int64_t emulated_tile_products(void) { return __atomic_exchange_n(&products, 0, __ATOMIC_RELAXED); }

static void require(int condition, const char *message) {
  if (condition) return;
  fprintf(stderr, "AMX: %s\n", message);
  abort();
}

static void use(int tile) {
  require(state.configured, "a tile is used before ldtilecfg or after tilerelease");
  require(tile >= 0 && tile < TILES && state.rows[tile] > 0, "a tile is used that has no size");
}

void emulated_ldtilecfg(const uint8_t *config) {
  require(config[0] == 1, "the palette is not 1");
  for (int i = 0; i < TILES; ++i) {
    state.bytes[i] = config[16 + 2 * i] | config[17 + 2 * i] << 8;
    state.rows[i] = config[48 + i];
    require(state.rows[i] <= ROWS && state.bytes[i] <= BYTES, "a tile is too large");
  }
  memset(state.data, 0x55, sizeof state.data);  // hardware zeroes; a kernel must not rely on it
  state.configured = 1;
}

void emulated_tilerelease(void) { state.configured = 0; }

void emulated_tilezero(uint8_t tile) {
  use(tile);
  memset(state.data[tile], 0, sizeof state.data[tile]);
}

void emulated_tileloadd64(uint8_t tile, const char *from, int64_t stride) {
  use(tile);
  for (int row = 0; row < state.rows[tile]; ++row)
    memcpy(state.data[tile][row], from + row * stride, state.bytes[tile]);
}

void emulated_tilestored64(uint8_t tile, char *to, int64_t stride) {
  use(tile);
  for (int row = 0; row < state.rows[tile]; ++row)
    memcpy(to + row * stride, state.data[tile][row], state.bytes[tile]);
}

// C[m][n] += sum over k, j of A[m][4 k + j] B[k][4 n + j], both signed.
void emulated_tdpbssd(uint8_t c, uint8_t a, uint8_t b) {
  use(c), use(a), use(b);
  require(c != a && c != b && a != b, "a product names a tile twice");
  require(state.rows[c] == state.rows[a] && state.bytes[c] == state.bytes[b] &&
              state.bytes[a] == 4 * state.rows[b],
          "sizes of a product's tiles do not fit");
  for (int m = 0; m < state.rows[c]; ++m) {
    int32_t sums[ROWS];
    memcpy(sums, state.data[c][m], sizeof sums);
    for (int k = 0; k < state.rows[b]; ++k)
      for (int n = 0; n < state.bytes[c] / 4; ++n)
        for (int j = 0; j < 4; ++j)
          sums[n] += state.data[a][m][4 * k + j] * state.data[b][k][4 * n + j];
    memcpy(state.data[c][m], sums, sizeof sums);
  }
  __atomic_add_fetch(&products, 1, __ATOMIC_RELAXED);
}
