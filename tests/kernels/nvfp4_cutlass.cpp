// Prints the fragment layouts that CUTLASS has for the block-scaled product: per operand, for each lane and each of its
// values, the index in the matrix (columns of a matrix follow each other).
#include <cstdio>

#include <cute/atom/mma_traits_sm120.hpp>

using Element = cutlass::float_e2m1_t;
using Atom = cute::SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<Element, Element, float, cutlass::float_ue4m3_t, 16>;
using Traits = cute::MMA_Traits<Atom>;

template <class Layout>
void show(const char* name, Layout layout) {
  std::printf("%s", name);
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < int(cute::size<1>(layout)); ++value) std::printf(" %d", int(layout(lane, value)));
  }
  std::printf("\n");
}

int main() {
  show("a", Traits::ALayout{});
  show("b", Traits::BLayout{});
  show("c", Traits::CLayout{});
  show("scale_a", Traits::SFALayout{});
  show("scale_b", Traits::SFBLayout{});
}
